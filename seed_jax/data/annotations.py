"""Official annotation files as sources of pictures with captions.

| file | of |
|---|---|
| captions_val2014.json and the like | COCO captions |
| nocaps_val_4500_captions.json | NoCaps: the same layout, with a domain a picture |
| dataset_coco.json, dataset_flickr30k.json | Karpathy's splits of COCO and Flickr30K |
| results_20130124.token | Flickr30K |
| Train_GCC-training.tsv, or any .tsv of captions and addresses or paths | CC3M, CC12M |
| a list of {"image": …, "caption": …} | CC3M and others as BLIP and LLaVA name their pictures |

They name pictures, which lie in a folder beside; see docs/evaluation.md for where both come from.
"""

import json
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from seed_jax.cli import UserError, few
from seed_jax.data import checksums
from seed_jax.data.sources import Record, read_text

ALLOWED_MISSING = 0.01
SUFFIXES = (".json", ".token", ".tsv")
# What a .tsv file's first line may call its columns.
CAPTION_COLUMNS = ("caption", "title", "text")
PICTURE_COLUMNS = ("image", "file_name", "filepath", "path", "url", "image_url")
# What complete files hold: layout, data set and split -> name, pictures.
BENCHMARKS = {
    ("karpathy", "coco", "test"): ("COCO 5K", 5000),
    ("karpathy", "flickr30k", "test"): ("Flickr30K 1K", 1000),
    ("coco", "nocaps", None): ("NoCaps", 4500),
}


class Annotated(NamedTuple):
    """What a file says of a picture.

    Attributes:
      id: its own, unique in the file.
      names: where it may lie below the folder of pictures.
    """

    id: str
    names: tuple[str, ...]
    captions: list[str]
    split: str | None = None
    domain: str | None = None


class AnnotatedPictures:
    """A source of pictures that an annotation file names."""

    def __init__(
        self, path: Path, pictures: Sequence[tuple[Annotated, Path]], benchmark: str | None
    ):
        """`benchmark` is what the paper calls these data, if they are its."""
        self.path, self.benchmark = str(path), benchmark
        self._pictures = pictures

    def __len__(self) -> int:
        return len(self._pictures)

    def __getitem__(self, index: int) -> Record:
        said, file = self._pictures[index]
        return {**without_picture(said), "image": file.read_bytes()}

    def name(self, index: int) -> str:
        return str(self._pictures[index][1])


def without_picture(said: Annotated) -> Record:
    """A record that only its picture's bytes are missing from."""
    record: Record = {"id": said.id, "image": b"", "captions": said.captions}
    if said.split is not None:
        record["split"] = said.split
    if said.domain is not None:
        record["domain"] = said.domain
    return record


def is_annotation_file(path: str | Path) -> bool:
    """Whether `open_annotations` rather than `open_source` opens it."""
    return Path(path).suffix in SUFFIXES


def open_annotations(
    path: Path,
    folder: Path | None,
    split: str | None = None,
    *,
    captions: int = 0,
    allow_missing: bool = False,
) -> AnnotatedPictures:
    """Opens an annotation file.

    Args:
      folder: where its pictures lie, as their archives unpack.
      split: of Karpathy's; None: 'test'.
      captions: keeps so many first captions of each picture; 0 keeps all.
      allow_missing: leaves out pictures that are not there, however many; otherwise up to 1 %.

    A file that is not the published one of its name is told, and read all the same.

    Raises:
      UserError: the file is none of these, is cut short, names a picture twice, has captions of
        none or none of a picture; no such split; or too many pictures are missing.
    """
    layout, dataset, said = read_annotations(path)
    if doubt := checksums.doubt(path):
        print(f"{doubt}; figures may not compare with others': download it again")
    if layout == "karpathy":
        split = split or "test"
    if split:
        there = {one.split for one in said}
        said = [one for one in said if one.split == split]
        if not said:
            names = ", ".join(sorted(name for name in there if name)) or "none"
            raise UserError(f"{path}: no pictures in split {split!r}; its splits: {names}")
    if bare := [one.id for one in said if not one.captions]:
        raise UserError(f"{path}: {tell(bare, 'picture')} without a caption; name another file")
    if captions:
        said = [one._replace(captions=one.captions[:captions]) for one in said]
    name, count = BENCHMARKS.get((layout, dataset, split), (None, 0))
    files = locate(path, folder, [one.names for one in said], allow_missing=allow_missing)
    pictures = [(one, file) for one, file in zip(said, files, strict=True) if file]
    return AnnotatedPictures(path, pictures, name if len(said) == count else None)


def read_annotations(path: Path) -> tuple[str, str, list[Annotated]]:
    """The layout of a file, the data set, and what it says of each picture.

    Raises:
      UserError: the file is none of these, is cut short, or names a picture twice.
    """
    if path.suffix == ".token":
        return "token", "flickr30k", list(_flickr(path))
    if path.suffix == ".tsv":
        return "tsv", "", list(_table(path))
    content = read_json(path)
    if isinstance(content, list) and content:
        said = list(_list(path, content))
        refuse_twice(path, (one.id for one in said), "picture")
        return "list", "", said
    images = content.get("images") if isinstance(content, dict) else None
    if not isinstance(images, list) or not images:
        raise not_known(path)
    try:
        if "sentences" in images[0]:
            said = [_karpathy(one) for one in images]
            refuse_twice(path, (one.id for one in said), "picture")
            return "karpathy", content.get("dataset", ""), said
        said = list(_coco(path, images, content["annotations"]))
        nocaps = all(one.domain for one in said)
        return "coco", "nocaps" if nocaps else "coco", said
    except (KeyError, TypeError) as error:
        raise not_known(path, f"an entry lacks {error}") from None


def _karpathy(image: dict[str, Any]) -> Annotated:
    name = image["filename"]
    beside = f"{image['filepath']}/{name}" if "filepath" in image else name
    captions = [sentence["raw"].strip() for sentence in image["sentences"]]
    # Those of COCO begin with its pictures' own numbers.
    return Annotated(
        str(image.get("cocoid", image["imgid"])), (beside, name), captions, image["split"]
    )


def _coco(
    path: Path, images: list[dict[str, Any]], annotations: list[dict[str, Any]]
) -> Iterator[Annotated]:
    refuse_twice(path, (image["id"] for image in images), "picture")
    refuse_twice(path, (entry["id"] for entry in annotations), "caption")
    captions: dict[Any, list[str]] = {image["id"]: [] for image in images}
    for entry in annotations:
        if entry["image_id"] not in captions:
            raise UserError(
                f"{path}: caption {entry['id']} is of picture {entry['image_id']}, which the file "
                "does not list; are pictures and captions of the same split?"
            )
        if text := entry["caption"].strip():
            captions[entry["image_id"]].append(text)
    for image in images:
        yield Annotated(
            str(image["id"]),
            (image["file_name"], Path(image["file_name"]).name),
            captions[image["id"]],
            domain=image.get("domain"),
        )


def _list(path: Path, entries: list[Any]) -> Iterator[Annotated]:
    for number, entry in enumerate(entries):
        try:
            name = entry.get("image", entry.get("file_name"))
            captions = entry["caption"]
            captions = [captions] if isinstance(captions, str) else captions
            kept = [caption.strip() for caption in captions if caption.strip()]
            yield Annotated(str(entry.get("id", name)), (name, Path(name).name), kept)
        except (AttributeError, KeyError, TypeError):
            raise not_known(path, f'entry {number} has no "image" and "caption"') from None


def _table(path: Path) -> Iterator[Annotated]:
    rows = [line.split("\t") for line in read_text(_there(path)).split("\n") if line]
    if not rows:
        raise not_known(path, "it is empty")
    names = [name.strip().lower() for name in rows[0]]
    caption = next((names.index(name) for name in CAPTION_COLUMNS if name in names), None)
    picture = next((names.index(name) for name in PICTURE_COLUMNS if name in names), None)
    if caption is not None and picture is not None:
        rows = rows[1:]
    else:
        # CC3M's files have the caption first, CC12M's the address.
        picture, caption = (0, 1) if _is_address(rows[0][0]) else (1, 0)
    for number, row in enumerate(rows):
        if len(row) <= max(picture, caption):
            raise UserError(f"{path}: row {number} has {len(row)} columns: {row[0][:40]!r}…")
        where, text = row[picture].strip(), row[caption].strip()
        places = _downloaded_as(number, where) if _is_address(where) else (where,)
        yield Annotated(f"{number:09}", places, [text] if text else [])


def _is_address(text: str) -> bool:
    return text.startswith(("http://", "https://"))


def _downloaded_as(number: int, address: str) -> tuple[str, ...]:
    """What usual download scripts call the picture of a row, counted from 0."""
    key = zlib.crc32(address.encode())
    return f"{number:09}.jpg", f"GCC_train_{number:09}.jpg", f"{number}_{key}", str(key)


def _flickr(path: Path) -> Iterator[Annotated]:
    captions: dict[str, dict[str, str]] = {}
    for number, line in enumerate(read_text(_there(path)).split("\n"), 1):
        if not line.strip():
            continue
        key, tab, text = line.partition("\t")
        name, hash_sign, place = key.rpartition("#")
        if not tab or not hash_sign:
            raise UserError(f"{path}:{number} is not NAME.jpg#NUMBER, a tab and a caption")
        own = captions.setdefault(name, {})
        if place in own:
            raise UserError(f"{path}:{number}: caption {key} is there twice")
        own[place] = text.strip()
    if not captions:
        raise not_known(path)
    for name, own in captions.items():
        yield Annotated(Path(name).stem, (name,), list(own.values()))


def read_json(path: Path) -> Any:
    """What a JSON file holds.

    Raises:
      UserError: there is none, or it is no JSON.
    """
    try:
        return json.loads(_there(path).read_bytes())
    except ValueError as error:
        raise UserError(f"{path}: not JSON, or cut short ({error}); get it again") from None


def _there(path: Path) -> Path:
    if not path.is_file():
        raise UserError(f"{path}: no such file; docs/evaluation.md says where to get it")
    return path


def not_known(path: Path, why: str = "") -> UserError:
    """What to raise for a file of no known layout."""
    return UserError(
        f"{path}: no annotation file of a kind that docs/evaluation.md lists"
        + (f" ({why})" if why else "")
    )


def refuse_twice(path: Path, ids: Iterable[Any], what: str) -> None:
    """Raises a UserError if an id is there twice."""
    if twice := [str(one) for one, count in Counter(ids).items() if count > 1]:
        raise UserError(f"{path}: {tell(twice, f'{what} id')} there more than once; get it again")


def tell(names: Sequence[str], what: str) -> str:
    """'3 picture ids (1, 2, 3)', or with more than a few, the first of them."""
    return f"{len(names)} {what}{'s' if len(names) > 1 else ''} ({few(names)})"


def locate(
    path: Path,
    folder: Path | None,
    names: Sequence[tuple[str, ...]],
    *,
    allow_missing: bool,
) -> list[Path | None]:
    """The files of pictures; None for those that are missing, which are counted and told.

    Args:
      path: the annotation file, for messages.
      names: where each picture may lie below `folder`.

    Raises:
      UserError: no folder, none of the pictures is there, or more than 1 % are not.
    """
    if folder is None:
        raise UserError(f"{path} names pictures; say where they lie by --images FOLDER")
    if not folder.is_dir():
        raise UserError(f"--images {folder}: no such folder")
    found = [
        next((folder / name for name in own if (folder / name).is_file()), None) for own in names
    ]
    missing = [own[0] for own, file in zip(names, found, strict=True) if file is None]
    if not missing:
        return found
    told = f"{tell(missing, 'picture')} of {len(names)} in {path} are not in {folder}"
    if len(missing) == len(names):
        raise UserError(f"{told}; name the folder that they lie in by --images")
    if len(missing) > ALLOWED_MISSING * len(names) and not allow_missing:
        raise UserError(f"{told}; get them, or go on without them by --allow-missing")
    print(f"{told}, and are left out")
    return found
