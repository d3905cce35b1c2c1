"""The page's style: a theme of system fonts (nothing is loaded from elsewhere) and the layout's CSS."""

from __future__ import annotations

from typing import Any

_FONTS = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "Helvetica Neue", "Arial", "sans-serif"]
_MONO = ["ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace"]

CSS = """
.gradio-container .main.app { max-width: 1280px; width: 100%; margin: 0 auto;
  padding: 18px clamp(12px, 2.2vw, 28px) 4px !important; }
.gradio-container .html-container { padding: 0 !important; }
header.sightline { display: flex; flex-wrap: wrap; align-items: center; gap: 6px 14px; padding: 0 0 4px; }
header.sightline svg { width: 26px; height: 26px; margin-right: -4px; }
header.sightline h1 { font-size: 1.4rem; font-weight: 650; letter-spacing: -0.02em; line-height: 1; margin: 0; }
.chips { display: flex; flex-wrap: wrap; gap: 6px; }
.chip { font: 500 0.75rem/1.7 var(--font-mono); padding: 0 9px; border-radius: 999px;
  color: var(--body-text-color-subdued); border: 1px solid var(--border-color-primary); }

#page { display: grid; gap: 14px 20px; align-items: start; grid-template-columns: minmax(280px, 350px) minmax(0, 1fr);
  grid-template-areas: "image chat" "side chat"; grid-template-rows: auto 1fr; }
#image-column { grid-area: image; }
#side-column { grid-area: side; }
#chat-column { grid-area: chat; position: sticky; top: 12px; }
#image-column, #side-column, #chat-column { min-width: 0 !important; gap: 12px; }
#image { height: 280px; }
#chat { height: calc(100dvh - 196px) !important; min-height: 420px; }
#chat .placeholder { padding: 0 12px; text-align: center; }
#chat .placeholder h3 { margin-bottom: 4px; }
#chat .example { padding: 10px 14px; border-radius: 10px; }
#chat .message-buttons-right { display: none; }
#chat .message.bot { background: transparent; border-color: transparent; box-shadow: none; padding-left: 2px; }
#chat .examples { grid-template-columns: repeat(auto-fit, minmax(170px, 1fr)); width: 100%; }

#question, #address { border-radius: 12px; border: 1px solid var(--border-color-primary);
  background: var(--background-fill-primary); box-shadow: 0 1px 2px rgb(15 23 42 / 6%); overflow: hidden; }
#question:focus-within, #address:focus-within { border-color: var(--primary-400);
  box-shadow: 0 0 0 3px color-mix(in srgb, var(--primary-400) 22%, transparent); }
#question textarea, #address input, #address textarea { background: transparent; border: 0 !important;
  box-shadow: none !important; }
#question textarea { font-size: 1rem; padding: 13px 14px; }
#question .input-container, #address .input-container { align-items: center; padding-right: 6px; }
#address button { margin: 0; font-size: 0.85rem; }

#page .block:has(> .html-container):not(:has(p)):not(:has(table)) { display: none; }
p.notice { margin: 0; padding: 8px 12px; border-radius: 8px; font-size: 0.9rem; overflow-wrap: anywhere;
  color: #9f1239; background: #fff1f2; border: 1px solid #fecdd3; }
.dark p.notice { color: #fecdd3; background: #4c0519; border-color: #881337; }
p.status { margin: 0; font: 0.78rem/1.4 var(--font-mono); color: var(--body-text-color-subdued); }

table.facts { width: 100%; margin: 0 !important; border-collapse: collapse; font-size: 0.85rem; table-layout: auto; }
table.facts, table.facts tr, table.facts th, table.facts td { border: 0 !important; background: transparent; }
table.facts th, table.facts td { padding: 3px 0 !important; text-align: left; vertical-align: top; font-weight: 400; }
table.facts th { width: 1%; white-space: nowrap; color: var(--body-text-color-subdued); }
table.facts td { padding-left: 14px !important; overflow-wrap: anywhere; font-variant-numeric: tabular-nums; }
table.facts caption { text-align: left; padding: 14px 0 2px; font-weight: 600; color: var(--body-text-color); }
table.parity th { width: auto; white-space: normal; }
table.parity td { text-align: right; white-space: nowrap; }
table.parity .bound { display: block; font-size: 0.75rem; color: var(--body-text-color-subdued); }
table.parity .passed { color: #059669; font-weight: 600; }
table.parity .failed { color: #be123c; font-weight: 600; }
footer .divider { display: none !important; }

@media (max-width: 760px) {
  #page { grid-template-columns: minmax(0, 1fr); grid-template-rows: none;
    grid-template-areas: "image" "chat" "side"; }
  #image { height: 210px; }
  #chat-column { position: static; }
  #chat { height: 56dvh !important; min-height: 320px; }
  #chat .examples { grid-template-columns: 1fr; }
}
"""


def theme() -> Any:
    """Gradio's plain theme in neutral greys with one accent."""
    import gradio as gr

    return gr.themes.Base(
        primary_hue="indigo", secondary_hue="slate", neutral_hue="slate", radius_size="md", font=_FONTS, font_mono=_MONO
    )
