"""Small pictures with captions for tests: files, folders, ArrayRecord, and a tokenizer for them."""

import io
import json
from pathlib import Path

import numpy as np
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from seed_jax.data import sources
from seed_jax.data.sources import write_array_record

WORDS = ["a", "red", "green", "blue", "cat", "dog", "on", "the", "mat"]


def picture(number: int, size: int = 12) -> bytes:
    """A picture whose mean colour tells its number."""
    noise = np.random.default_rng(number).integers(-8, 9, (size, size, 3))
    colour = [60 + number % 12 * 12, 60 + number // 12 * 12, 128]
    file = io.BytesIO()
    Image.fromarray((noise + colour).astype(np.uint8)).save(file, "PNG")
    return file.getvalue()


def records(count: int) -> list[sources.Record]:
    return [
        {
            "id": f"picture-{number}",
            "image": picture(number),
            "captions": [f"a {WORDS[1 + number % 3]} cat", f"the dog {number}"],
            "tags": ["mat", "blue", "on"],
            "split": "test" if number % 4 == 3 else "train",
        }
        for number in range(count)
    ]


def write_records(path: Path, count: int, *, unreadable: tuple[int, ...] = ()) -> Path:
    rows = records(count)
    for number in unreadable:
        rows[number]["image"] = b"this is text"
    write_array_record(path, rows)
    return path


def write_folder(path: Path, count: int) -> Path:
    (path / "more").mkdir(parents=True)
    with (path / "captions.jsonl").open("w") as file:
        for number in range(count):
            name = f"{'more/' if number % 2 else ''}{number:03}.png"
            (path / name).write_bytes(picture(number))
            file.write(json.dumps({"image": name, "caption": f"cat {number}"}) + "\n")
    return path


def word_tokenizer() -> PreTrainedTokenizerFast:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", ",", *WORDS]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, "[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="[PAD]", unk_token="[UNK]")
