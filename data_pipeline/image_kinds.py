"""What kind of image a file is: by its first bytes, whatever its name says.

Owns the names and the beginnings of the kinds. Does not own decoding (`images`).

References: each format's specification; ISO/IEC 23000-22 and 23008-12 for the brands of AVIF and HEIC.
"""

from __future__ import annotations

from collections.abc import Mapping

_NAMES: Mapping[str, tuple[str, ...]] = {
    "jpeg": ("jpg", "jpeg", "jfif", "jpe", "jif", "pjpeg"),
    "png": ("png", "apng"),
    "webp": ("webp",),
    "gif": ("gif",),
    "bmp": ("bmp", "dib"),
    "tiff": ("tif", "tiff"),
    "jp2": ("jp2", "j2k", "jpf", "jpx", "j2c", "jpc"),
    "avif": ("avif", "avifs"),
    "ppm": ("ppm", "pgm", "pbm", "pnm"),
    "heic": ("heic", "heif", "hif"),
    "jxl": ("jxl",),
    "svg": ("svg",),
    "psd": ("psd",),
    "ico": ("ico", "cur"),  # this and what follows by the ending alone: their first bytes may begin other files
    "pcx": ("pcx",),
    "eps": ("eps", "ps"),
    "pdf": ("pdf",),
    "exr": ("exr",),
    "dds": ("dds",),
    "hdr": ("hdr",),
    "tga": ("tga",),
}
"""The endings of each kind; the first is the one that `make` writes."""

_ADVICE: Mapping[str, str] = {
    "jxl": "JPEG XL, which Pillow cannot read: convert it to JPEG or PNG",
    "svg": "SVG, a drawing without pixels: render it to PNG",
    "psd": "a Photoshop document: export it as JPEG or PNG",
    "ico": "an icon of several sizes: save the one that is meant as PNG",
    "pcx": "PCX, which is not read: convert it to PNG",
    "eps": "PostScript, a program: render it to PNG",
    "pdf": "PDF, a document of pages: render the one that is meant to PNG",
    "exr": "OpenEXR, whose brightness has no upper end: convert it to PNG",
    "dds": "DDS, a texture: convert it to PNG",
    "hdr": "Radiance HDR, whose brightness has no upper end: convert it to PNG",
    "tga": "TGA, which is not read: convert it to PNG",
}
"""What no decoder here reads, and what to do."""

UNREADABLE_EXTENSIONS = frozenset(name for kind in _ADVICE for name in _NAMES[kind])
"""Their endings: named, so that none of them is passed over in silence."""

IMAGE_EXTENSIONS = frozenset(name for names in _NAMES.values() for name in names) - UNREADABLE_EXTENSIONS
"""Endings of images that can be read; HEIC with pillow-heif."""

VIDEO_EXTENSIONS = frozenset(("mp4", "m4v", "mov", "avi", "mkv", "webm", "mpg", "mpeg", "wmv", "flv", "3gp"))
"""Endings of videos, which are refused by name."""

_HEIC = b"heic heix heim heis hevc hevx hevm hevs mif1 msf1"


def image_kind(payload: bytes) -> str | None:
    """`jpeg`, `png`, `heic`, … by the first bytes; None where they are of no image. 32 bytes are enough."""
    if payload[4:8] == b"ftyp":
        brand = payload[8:12]
        if brand in (b"avif", b"avis"):
            return "avif"
        if brand in _HEIC.split():
            return "avif" if b"avif" in payload[12:32] else "heic"
    for start, kind in (
        (b"\xff\xd8\xff", "jpeg"),
        (b"\x89PNG\r\n\x1a\n", "png"),
        (b"GIF87a", "gif"),
        (b"GIF89a", "gif"),
        (b"II*\0", "tiff"),
        (b"MM\0*", "tiff"),
        (b"\0\0\0\x0cjP  ", "jp2"),
        (b"\xff\x4f\xff\x51", "jp2"),
        (b"\xff\x0a", "jxl"),
        (b"\0\0\0\x0cJXL ", "jxl"),
        (b"8BPS", "psd"),
    ):
        if payload.startswith(start):
            return kind
    if payload[:4] == b"RIFF" and payload[8:12] == b"WEBP":
        return "webp"
    if payload[:2] == b"BM" and payload[6:10] == bytes(4):  # the reserved field, since two letters may begin any text
        return "bmp"
    return None


def extension_for(payload: bytes, name: str) -> str:
    """The ending for an image in a shard: the one it has where that fits its content, else that of its kind."""
    kind = image_kind(payload)
    return name if kind is None or name in _NAMES[kind] else _NAMES[kind][0]


def advice_by_ending(extension: str) -> str | None:
    """What an image that nobody reads is by its name's ending, and what to do; None for other endings."""
    ending = extension.rsplit(".", 1)[-1]
    return next((advice for kind, advice in _ADVICE.items() if ending in _NAMES[kind]), None)


def cannot_be_read(payload: bytes, *, heic: bool) -> str | None:
    """What an image is that no decoder here reads, and what to do; None where one may.

    Args:
        heic: whether there is a decoder for HEIC.
    """
    kind = image_kind(payload)
    if kind == "heic" and not heic:
        return "HEIC, as phones write it: `pip install pillow-heif`, or convert it to JPEG"
    return _ADVICE.get(kind or "")
