"""Whether an official annotation file is what was published, as far as that can be told.

Checksums of the unpacked files are hardly ever published, those of their archives are: so a file is
also held against its archive, where that lies beside it.
"""

import zipfile
import zlib
from pathlib import Path

from seed_jax.files import sha256

CHUNK = 1 << 20
# SHA-256. Of the archives: tensorflow/datasets, url_checksums/coco_captions.txt. Of the unpacked
# file: Git LFS' pointer to it in vipulnj/coco-box-extraction.
PUBLISHED = {
    "caption_datasets.zip": "4cfd70132527b80933105e5829dc9034eaab9573482e2e680abbab6130244817",
    "annotations_trainval2014.zip": (
        "031296bbc80c45a1d1f76bf9a90ead27e94e99ec629208449507a4917a3bf009"
    ),
    "captions_val2014.json": "7da4cc45cb76ee1642d163e846e1e0a33feffac2e841c9c426d585ea499165a4",
}
ARCHIVES = {
    "dataset_coco.json": "caption_datasets.zip",
    "dataset_flickr30k.json": "caption_datasets.zip",
    "captions_val2014.json": "annotations_trainval2014.zip",
    "captions_train2014.json": "annotations_trainval2014.zip",
}


def doubt(file: Path) -> str:
    """Why a file may not be the one that was published; '' where nothing speaks against it."""
    if wrong := _of_another_hash(file):
        return wrong
    archives = [
        folder / ARCHIVES.get(file.name, "") for folder in (file.parent, *file.parents[1:2])
    ]
    archive = next((archive for archive in archives if archive.is_file()), None)
    if archive is None:
        return ""
    return _of_another_hash(archive) or _unlike_archive(file, archive)


def _of_another_hash(file: Path) -> str:
    expected = PUBLISHED.get(file.name)
    if expected is None:
        return ""
    found = sha256(file)
    return (
        ""
        if found == expected
        else f"{file} has SHA-256 {found[:12]}…, the published one {expected[:12]}…"
    )


def _unlike_archive(file: Path, archive: Path) -> str:
    with zipfile.ZipFile(archive) as opened:
        checksums = [one.CRC for one in opened.infolist() if Path(one.filename).name == file.name]
    return "" if _crc(file) in checksums else f"{file} is not what {archive} holds under that name"


def _crc(file: Path) -> int:
    found = 0
    with file.open("rb") as opened:
        while chunk := opened.read(CHUNK):
            found = zlib.crc32(chunk, found)
    return found
