"""The report's style sheet: light and dark, from a phone to a desk. Nothing is loaded from elsewhere."""

from __future__ import annotations

CSS = """
:root { color-scheme: light dark; --page: #fbfbfa; --card: #ffffff; --text: #17191c; --soft: #5c636d; --line: #e3e5e8;
  --faint: #f1f2f3; --seen: #2563c9; --blind: #b45f06; --right: #16733f; --wrong: #b3261e; }
@media (prefers-color-scheme: dark) {
  :root { --page: #131519; --card: #1b1e24; --text: #e8eaed; --soft: #9aa2ad; --line: #2e333b; --faint: #23272e;
    --seen: #76a9fa; --blind: #e9a04f; --right: #5fce8d; --wrong: #ff8a80; } }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { margin: 0; background: var(--page); color: var(--text); font: 16px/1.55 system-ui, -apple-system, "Segoe UI",
  Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1060px; margin: 0 auto; padding: 40px 24px 72px; }
h1 { font-size: clamp(1.6rem, 4.5vw, 2.2rem); line-height: 1.15; letter-spacing: -0.025em; margin: 4px 0 12px; }
h2 { font-size: 1.2rem; letter-spacing: -0.012em; margin: 56px 0 4px; }
h3 { font-size: 0.95rem; margin: 0; }
p { margin: 0 0 12px; max-width: 70ch; text-wrap: pretty; }
.mark { color: var(--soft); font-size: 0.85rem; font-weight: 600; letter-spacing: 0.02em; margin: 0; }
.lead { font-size: 1.08rem; }
.note { color: var(--soft); font-size: 0.9rem; }
.seen { color: var(--seen); } .blind { color: var(--blind); } .right-mark { color: var(--right); }
.wrong-mark { color: var(--wrong); }

.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 1px; margin: 28px 0 0;
  background: var(--line); border: 1px solid var(--line); border-radius: 12px; overflow: hidden; }
.tile { background: var(--card); padding: 16px 18px; }
.tile b { display: block; font-size: 1.7rem; line-height: 1.2; font-weight: 650; letter-spacing: -0.02em;
  font-variant-numeric: tabular-nums; white-space: nowrap; }
.tile b small { font-size: 0.95rem; font-weight: 500; letter-spacing: 0; color: var(--soft); }
.tile span { color: var(--soft); font-size: 0.85rem; line-height: 1.35; display: block; }

.panel { background: var(--card); border: 1px solid var(--line); border-radius: 12px; padding: 20px 22px; }
.wide { overflow-x: auto; margin: 16px 0 0;
  background: linear-gradient(90deg, var(--card) 40%, transparent) 0 0 / 40px 100%,
  linear-gradient(270deg, var(--card) 40%, transparent) 100% 0 / 40px 100%,
  linear-gradient(90deg, rgb(0 0 0 / 14%), transparent) 0 0 / 12px 100%,
  linear-gradient(270deg, rgb(0 0 0 / 14%), transparent) 100% 0 / 12px 100%;
  background-repeat: no-repeat; background-attachment: local, local, scroll, scroll; }
h2 + .panel { margin-top: 14px; } .panel > .wide:first-child { margin-top: 0; }
table { border-collapse: collapse; width: 100%; font-size: 0.92rem; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: 7px 0 7px 18px; border-bottom: 1px solid var(--line); white-space: nowrap;
  vertical-align: baseline; }
th { font-weight: 500; color: var(--soft); font-size: 0.82rem; }
tbody th { color: var(--text); font-size: inherit; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
tr:last-child > * { border-bottom: 0; }
td small { color: var(--soft); font-size: 0.8rem; display: block; line-height: 1.3; }

.legend { display: flex; flex-wrap: wrap; gap: 4px 20px; font-size: 0.85rem; color: var(--soft); margin: 0 0 12px; }
.legend i { display: inline-block; width: 11px; height: 11px; border-radius: 50%; margin-right: 7px; }
.legend i.seen { background: var(--seen); } .legend i.blind { border: 2px solid var(--blind); }
.legend i.whisker { height: 3px; width: 20px; border-radius: 2px; background: var(--soft); vertical-align: 3px; }

.dots { position: relative; --label: 152px; padding-bottom: 22px; }
.dot-grid, .dot-axis { position: absolute; left: var(--label); right: 14px; top: 0; bottom: 22px; }
.dot-grid i { position: absolute; top: 0; bottom: 0; width: 1px; background: var(--line); }
.dot-axis { top: auto; bottom: 0; height: 18px; }
.dot-axis span { position: absolute; transform: translateX(-50%); font-size: 0.75rem; color: var(--soft); }
.dot-row { display: grid; grid-template-columns: var(--label) 1fr; align-items: center; height: 46px;
  font-size: 0.92rem; }
.track { position: relative; height: 100%; margin-right: 14px; }
.track > * { position: absolute; top: 50%; }
.track .span { height: 2px; margin-top: -1px; background: var(--line); }
.track .whisker { height: 4px; margin-top: -2px; border-radius: 2px; opacity: 0.4; }
.track .whisker.right { background: var(--seen); } .track .whisker.blind { background: var(--blind); }
.track b { width: 14px; height: 14px; margin: -7px 0 0 -7px; border-radius: 50%; }
.track b.right { background: var(--seen); }
.track b.blind { border: 2.5px solid var(--blind); background: var(--card); }
.track .value { font-size: 0.82rem; font-weight: 600; line-height: 1; margin-top: -0.5em; color: var(--seen);
  font-variant-numeric: tabular-nums; background: var(--card); padding: 1px 3px; }
.track .value.right { transform: translateX(11px); } .track .value.left { transform: translateX(calc(-100% - 11px)); }

.bar { display: inline-block; width: 84px; height: 7px; border-radius: 4px; background: var(--faint); overflow: hidden;
  margin-right: 4px; vertical-align: 1px; }
.bar + span { display: inline-block; min-width: 3.2em; }
.bar i { display: block; height: 100%; border-radius: 4px; background: var(--seen); }
.bar i.blind { background: var(--blind); }
.bar.time { width: 100%; margin: 0; min-width: 60px; }

.curves { display: grid; grid-template-columns: repeat(auto-fit, minmax(300px, 1fr)); gap: 16px; margin-top: 16px; }
.curve { display: grid; grid-template-columns: 34px 1fr; margin: 14px 0 6px; }
.curve .y { position: relative; }
.curve .y span { position: absolute; right: 8px; transform: translateY(-50%); font-size: 0.75rem; color: var(--soft);
  font-variant-numeric: tabular-nums; }
.curve .plot { position: relative; height: 190px; }
.curve svg { width: 100%; height: 100%; display: block; overflow: visible; }
.curve line { stroke: var(--line); vector-effect: non-scaling-stroke; }
.curve polyline { fill: none; stroke: var(--seen); stroke-width: 2; vector-effect: non-scaling-stroke;
  stroke-linejoin: round; }
.curve polyline.raw { opacity: 0.28; stroke-width: 1; }
.curve .plot b { position: absolute; right: -4px; width: 9px; height: 9px; margin-top: -4.5px; border-radius: 50%;
  background: var(--seen); }
.curve .x { grid-column: 2; display: flex; justify-content: space-between; font-size: 0.75rem; color: var(--soft);
  padding-top: 4px; }

.samples { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(400px, 100%), 1fr)); gap: 14px;
  margin-top: 16px; }
.sample { display: grid; grid-template-columns: 112px minmax(0, 1fr); gap: 16px; background: var(--card); padding: 14px;
  border: 1px solid var(--line); border-radius: 12px; align-items: start; }
.sample img { width: 112px; height: 112px; object-fit: contain; border-radius: 6px; background: var(--faint);
  display: block; }
.sample img.tiny { image-rendering: pixelated; }
.sample h3 { line-height: 1.35; font-weight: 600; overflow-wrap: break-word; margin-bottom: 6px; }
.sample dl { margin: 0; font-size: 0.88rem; line-height: 1.4; }
.sample dl > div { display: grid; grid-template-columns: 3.4em 1em minmax(0, 1fr); gap: 10px;
  padding: 2px 0; }
.captions dl > div { grid-template-columns: 4.8em minmax(0, 1fr); }
.photos .sample { grid-template-columns: 200px minmax(0, 1fr); }
.photos .sample img { width: 200px; height: 200px; }
.sample dt { color: var(--soft); } .sample dd { margin: 0; overflow-wrap: break-word; }
.sample .truth { border-top: 1px solid var(--line); margin-top: 3px; padding-top: 4px; }
.empty { color: var(--soft); font-style: italic; }

footer { margin-top: 56px; border-top: 1px solid var(--line); padding-top: 20px; }
footer h2 { margin-top: 0; }
ul { margin: 8px 0 0; padding-left: 20px; max-width: 74ch; } li { margin: 0 0 6px; font-size: 0.9rem;
  color: var(--soft); }
code { font: 0.85em ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; overflow-wrap: anywhere; }

@media (max-width: 640px) {
  main { padding: 24px 16px 48px; } .panel { padding: 16px 14px; } .dots { --label: 104px; }
  .dot-row { font-size: 0.82rem; line-height: 1.25; } .tile { padding: 12px 14px; } .tile b { font-size: 1.4rem; }
  .tiles { grid-template-columns: 1fr 1fr; } .tile:last-child:nth-child(odd) { grid-column: 1 / -1; }
  table { font-size: 0.86rem; } .bar { width: 56px; }
  h2 { margin-top: 40px; } th, td { padding-left: 14px; }
  .sample { grid-template-columns: 84px minmax(0, 1fr); gap: 14px; } .sample img { width: 84px; height: 84px; }
  .photos .sample { grid-template-columns: minmax(0, 1fr); } .photos .sample img { width: 100%; height: auto; } }
@media print { body { background: #fff; } .panel, .sample, .tiles { break-inside: avoid; } }
"""
