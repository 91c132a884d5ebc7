"""Rebuilds emoji.array_record, the pictures with captions that ship with the package.

Two renderings (Noto and Twemoji) of every emoji, labelled and tagged by people, on white,
64×64, 7 bits a channel, as WebP. EMOJI_LICENSES.md names the sources' licences. The same sources
give the same bytes with the pinned Pillow and array_record (two minutes). To fetch them:

    apt-get download fonts-noto-color-emoji=2.042-0+deb12u1 && dpkg -x fonts-noto-*.deb font
    npm pack emoji-datasource-twitter@16.0.0 emojibase-data@17.0.0
    for p in emoji-datasource-twitter-16.0.0 emojibase-data-17.0.0; do
        tar xzf $p.tgz --one-top-level --strip-components=1; done
    python -m seed_jax.assets.build_emoji \
        --font font/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf \
        --twemoji emoji-datasource-twitter-16.0.0 --emojibase emojibase-data-17.0.0

and then `python -m seed_jax.assets.build_tokenizer`, which learns from the training captions.

A record: {"id": "noto/1f34e", "image": WebP file, "captions": [label], "tags": [...],
"group": concept, "split": "train" | "style" | "concept"}.

  style    one rendering of an emoji whose other rendering is in `train`
  concept  whole groups of concepts (concepts.py) of which `train` has neither rendering; one
           rendering each, the other one is left out, so that no caption fits two pictures
"""

import argparse
import hashlib
import io
import json
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgpack
from array_record.python.array_record_module import ArrayRecordWriter
from fontTools.ttLib import TTFont
from PIL import Image

from seed_jax import cli
from seed_jax.assets.concepts import concept_group

OUTPUT = Path(__file__).with_name("emoji.array_record")
SIZE = 64
FONT_VERSION = "2.042"
TWEMOJI_VERSION = "16.0.0"
EMOJIBASE_VERSION = "17.0.0"
RENDERINGS = ("noto", "twemoji")

HELD_OUT = 250
# A bigger group is held out whole at a price: a tenth of the gallery would be one thing in small
# variations (flags, clock faces), and training would lose it all.
LARGEST_HELD_OUT_GROUP = 6
# Skin tones and hair styles: parts of other emoji, not pictures of something.
COMPONENT_GROUP = "component"


@dataclass(frozen=True)
class Emoji:
    """One emoji, with its picture file (PNG) in each rendering that has it."""

    code: str
    label: str
    tags: list[str]
    category: str
    group: str
    pictures: dict[str, bytes]


def strip_code(hexcode: str) -> str:
    """Returns the lower-case code points without U+FE0F, which the sources place differently."""
    return "-".join(point for point in hexcode.lower().split("-") if point != "fe0f")


def read_noto(path: Path, codes: Sequence[str]) -> dict[str, bytes]:
    """Returns the font's bitmap (a PNG file) for each of the codes it has one for."""
    font = TTFont(path)
    version = font["name"].getDebugName(5) or ""
    if FONT_VERSION not in version:
        raise cli.UserError(f"{path}: needs version {FONT_VERSION} of the font, this is {version}")
    bitmaps = font["CBDT"].strikeData[0]
    # Emoji of several code points are ligatures of their glyphs.
    glyphs = {}
    for lookup in font["GSUB"].table.LookupList.Lookup:
        for subtable in lookup.SubTable:
            table = getattr(subtable, "ExtSubTable", subtable)
            for first, ligatures in getattr(table, "ligatures", {}).items():
                for ligature in ligatures:
                    glyphs[first, *ligature.Component] = ligature.LigGlyph
    names = font.getBestCmap()
    pictures = {}
    for code in codes:
        sequence = tuple(names.get(int(point, 16), "") for point in code.split("-"))
        glyph = sequence[0] if len(sequence) == 1 else glyphs.get(sequence)
        if glyph in bitmaps:
            pictures[code] = bitmaps[glyph].imageData
    return pictures


def read_twemoji(package: Path) -> dict[str, bytes]:
    """Returns every picture (a PNG file) of the npm package by its code."""
    check_version(package, TWEMOJI_VERSION)
    files = sorted((package / "img" / "twitter" / "64").glob("*.png"))
    return {strip_code(file.stem): file.read_bytes() for file in files}


def check_version(package: Path, version: str) -> None:
    manifest = package / "package.json"
    if not manifest.is_file():
        raise cli.UserError(f"{manifest} is missing; give the folder of the unpacked npm package")
    found = json.loads(manifest.read_text())["version"]
    if found != version:
        raise cli.UserError(f"{package}: needs version {version} of the package, this is {found}")


def read_emoji(font: Path, twemoji: Path, emojibase: Path) -> list[Emoji]:
    """Returns the emoji that at least one rendering has, in the order of emojibase."""
    check_version(emojibase, EMOJIBASE_VERSION)
    entries = json.loads((emojibase / "en" / "data.json").read_text())
    names = json.loads((emojibase / "meta" / "groups.json").read_text())
    # Entries without a group are the letters that flags are spelled with.
    entries = [entry for entry in entries if "group" in entry]
    entries.sort(key=lambda entry: entry["order"])
    codes = [strip_code(entry["hexcode"]) for entry in entries]
    sources = {"noto": read_noto(font, codes), "twemoji": read_twemoji(twemoji)}

    emoji = []
    for code, entry in zip(codes, entries, strict=True):
        category = names["groups"][str(entry["group"])]
        pictures = {name: source[code] for name, source in sources.items() if code in source}
        if category == COMPONENT_GROUP or not pictures:
            continue
        group = concept_group(entry["label"], names["subgroups"][str(entry["subgroup"])])
        tags = entry.get("tags", [])
        emoji.append(Emoji(code, entry["label"], tags, category, group, pictures))
    return emoji


def rank(*parts: str) -> str:
    """A fixed random order: the same for everyone, and kept when other emoji come or go."""
    return hashlib.sha256("/".join(("seed_jax", *parts)).encode()).hexdigest()


def draw_concepts(emoji: Sequence[Emoji]) -> set[str]:
    """Returns the held-out groups: about `HELD_OUT` emoji, from each category its fair share."""
    groups = defaultdict(list)
    for item in emoji:
        groups[item.group].append(item)
    small = {k: v for k, v in groups.items() if len(v) <= LARGEST_HELD_OUT_GROUP}
    share = HELD_OUT / sum(map(len, small.values()))

    by_category = defaultdict(list)
    for name, members in small.items():
        by_category[members[0].category].append(name)
    drawn = set()
    for names in by_category.values():
        wanted = round(share * sum(len(small[name]) for name in names))
        for name in sorted(names, key=lambda name: rank("concept", name)):
            if len(small[name]) <= wanted:
                drawn.add(name)
                wanted -= len(small[name])
    return drawn


def assign_splits(emoji: Sequence[Emoji]) -> dict[tuple[str, str], str]:
    """Returns the split of each (code, rendering) that the set keeps."""
    concepts = draw_concepts(emoji)
    # Some flags are the same picture: no caption can tell them apart.
    copies = Counter(picture for item in emoji for picture in item.pictures.values())

    splits = {}
    candidates = []
    for item in emoji:
        names = sorted(item.pictures, key=lambda name: rank("rendering", item.code, name))
        if item.group in concepts:
            splits[item.code, names[0]] = "concept"
            continue
        splits.update({(item.code, name): "train" for name in names})
        if len(names) == 2 and all(copies[picture] == 1 for picture in item.pictures.values()):
            candidates.append(item)
    candidates.sort(key=lambda item: rank("style", item.code))
    for i, item in enumerate(candidates[:HELD_OUT]):
        splits[item.code, RENDERINGS[i % 2]] = "style"
    return splits


def encode_picture(png: bytes) -> bytes:
    """Returns the picture on white, padded to a square, `SIZE`×`SIZE`, as lossless WebP."""
    picture = Image.open(io.BytesIO(png)).convert("RGBA")
    side = max(picture.size)
    square = Image.new("RGBA", (side, side), "white")
    square.alpha_composite(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
    square = square.convert("RGB").resize((SIZE, SIZE), Image.Resampling.LANCZOS)
    # Lossless but for the lowest bit of each channel: it is noise of the font's palette and of the
    # resampling, and 14 % of the file. White stays white.
    square = square.point(lambda level: level | 1)
    files = []
    for quality, method in ((100, 4), (75, 6)):  # which effort packs better depends on the picture
        file = io.BytesIO()
        square.save(file, "WEBP", lossless=True, quality=quality, method=method)
        files.append(file.getvalue())
    return min(files, key=len)


def make_records(emoji: Sequence[Emoji]) -> list[dict[str, Any]]:
    splits = assign_splits(emoji)
    return [
        {
            "id": f"{name}/{item.code}",
            "image": encode_picture(picture),
            "captions": [item.label],
            "tags": item.tags,
            "group": item.group,
            "split": splits[item.code, name],
        }
        for item in emoji
        for name, picture in item.pictures.items()
        if (item.code, name) in splits
    ]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description="Rebuilds the embedded pictures; the top of this file says where to get these."
    )
    parser.add_argument("--font", type=Path, required=True, help="NotoColorEmoji.ttf")
    parser.add_argument("--twemoji", type=Path, required=True, help="emoji-datasource-twitter")
    parser.add_argument("--emojibase", type=Path, required=True, help="emojibase-data")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="default: %(default)s")
    args = parser.parse_args(argv)
    if not args.font.is_file():
        raise cli.UserError(f"{args.font} is missing; give the path of NotoColorEmoji.ttf")

    records = make_records(read_emoji(args.font, args.twemoji, args.emojibase))
    writer = ArrayRecordWriter(str(args.output), "group_size:1")
    for record in records:
        writer.write(msgpack.packb(record))
    writer.close()
    counts = Counter(record["split"] for record in records)
    print(f"{args.output}: {args.output.stat().st_size:,} bytes, {dict(counts)}")


if __name__ == "__main__":
    cli.run(main)
