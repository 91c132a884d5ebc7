"""Rebuilds the three small tokenizers from the training captions and tags of emoji.array_record.

    python -m seed_jax.assets.build_tokenizer

  text_tokenizer/                   BERT's kind: lower-case WordPiece, [CLS] text [SEP]
  tiny_stable_diffusion/tokenizer/  CLIP's kind: lower-case BPE, <|startoftext|> text <|endoftext|>
  tiny_opt/                         OPT's kind: BPE of bytes, </s> text

They load offline through the code that loads bert-base-uncased and CLIP's and OPT's vocabulary. The
held-out splits are not read. The vocabularies hold every single character of ASCII (OPT's every
byte), so that no English caption comes out unknown. The same pictures give the same files with the
pinned tokenizers.
"""

import argparse
import json
import string
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgpack
from array_record.python.array_record_module import ArrayRecordReader
from tokenizers import (
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import BertTokenizerFast, CLIPTokenizer, GPT2TokenizerFast
from transformers.models.clip.tokenization_clip import bytes_to_unicode

from seed_jax import cli
from seed_jax.data.sequences import CAPTION_PROMPT, DRAWING_PROMPT, QUESTION_PROMPT

ASSETS = Path(__file__).parent
WORDPIECES = 2000
BPE_PIECES = 1500
OPT_PIECES = 1536
COMMON_LETTERS = string.ascii_lowercase + string.digits + string.punctuation + "‘’“”–—…×÷−"
BERT_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
# The end token has the highest id: CLIP's text model finds it by that.
CLIP_SPECIAL = ("<|startoftext|>", "<|endoftext|>")
# As OPT numbers them.
OPT_SPECIAL = ("<s>", "<pad>", "</s>", "<unk>")
# What surrounds captions in training, so that it takes few tokens.
OPT_PROMPTS = (CAPTION_PROMPT, DRAWING_PROMPT, QUESTION_PROMPT.format("What is this?"))
OPT_PROMPT_WEIGHT = 100
# How CLIP splits a text into words (transformers' tokenization_clip.py).
CLIP_WORDS = r"""'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"""


def read_training_texts(path: Path) -> list[str]:
    """Returns the captions and tags of the records whose split is `train`."""
    if not path.is_file():
        raise cli.UserError(f"{path} is missing; python -m seed_jax.assets.build_emoji makes it")
    reader = ArrayRecordReader(str(path))
    records = [msgpack.unpackb(row) for row in reader.read_all()]
    reader.close()
    train = [record for record in records if record["split"] == "train"]
    return [text for record in train for text in (*record["captions"], *record["tags"])]


def train_pieces(tokenizer: Tokenizer, trainer: Any, texts: Sequence[str]) -> list[str]:
    """Returns the learnt vocabulary in order of its ids, which are those of the frequency.

    The trainers number the letters they meet in a random order, and break ties by number. Letters
    given as special tokens have fixed numbers; they come first in the answer.
    """
    tokenizer.train_from_iterator(texts, trainer)
    return sorted(tokenizer.get_vocab(), key=tokenizer.token_to_id)


def build_wordpiece(texts: Sequence[str], folder: Path) -> None:
    """Learns a BERT tokenizer of `WORDPIECES` entries and saves it."""
    learner = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    learner.normalizer = normalizers.BertNormalizer(lowercase=True)
    learner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    seen = {letter for text in texts for letter in learner.normalizer.normalize_str(text)}
    letters = sorted((seen | set(COMMON_LETTERS)) - {" "})
    # Punctuation is always a word of its own.
    inside = [f"##{letter}" for letter in letters if letter not in string.punctuation]
    trainer = trainers.WordPieceTrainer(
        vocab_size=WORDPIECES,
        special_tokens=[*BERT_SPECIAL, *letters, *inside],
        show_progress=False,
    )
    pieces = train_pieces(learner, trainer, texts)
    vocabulary = {piece: i for i, piece in enumerate(pieces)}

    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = learner.normalizer
    tokenizer.pre_tokenizer = learner.pre_tokenizer
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(token, vocabulary[token]) for token in ("[CLS]", "[SEP]")],
    )
    fast = BertTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=512, clean_up_tokenization_spaces=True
    )
    fast.save_pretrained(folder)
    # tokenizer.json says it all.
    (folder / "vocab.txt").unlink(missing_ok=True)


def build_bpe(texts: Sequence[str], folder: Path) -> None:
    """Learns a CLIP tokenizer of `BPE_PIECES` entries and saves it."""
    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token=CLIP_SPECIAL[1]))
    learner.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    learner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(CLIP_WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    # As in CLIP: all bytes, all bytes at the end of a word, what is learnt, the special tokens.
    letters = list(bytes_to_unicode().values())
    trainer = trainers.BpeTrainer(
        vocab_size=BPE_PIECES - len(CLIP_SPECIAL),
        special_tokens=[*letters, *(f"{letter}</w>" for letter in letters)],
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    pieces = [*train_pieces(learner, trainer, texts), *CLIP_SPECIAL]
    merges = json.loads(learner.to_str())["model"]["merges"]

    folder.mkdir(parents=True, exist_ok=True)
    vocabulary_file = folder / "vocab.json"
    vocabulary_file.write_text(json.dumps({piece: i for i, piece in enumerate(pieces)}))
    lines = ["#version: 0.2", *(" ".join(merge) for merge in merges)]
    merges_file = folder / "merges.txt"
    merges_file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    CLIPTokenizer(
        str(vocabulary_file), str(merges_file), model_max_length=77, pad_token=CLIP_SPECIAL[1]
    ).save_pretrained(folder)


def build_byte_bpe(texts: Sequence[str], folder: Path) -> None:
    """Learns an OPT tokenizer of `OPT_PIECES` entries and saves it."""
    words = pre_tokenizers.ByteLevel(add_prefix_space=False)
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = words
    trainer = trainers.BpeTrainer(
        vocab_size=OPT_PIECES,
        special_tokens=[*OPT_SPECIAL, *bytes_to_unicode().values()],
        show_progress=False,
    )
    # Most words come after a space.
    spaced = [f" {text}" for text in texts] + list(OPT_PROMPTS) * OPT_PROMPT_WEIGHT
    vocabulary = {piece: i for i, piece in enumerate(train_pieces(learner, trainer, spaced))}
    merges = [tuple(merge) for merge in json.loads(learner.to_str())["model"]["merges"]]

    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    tokenizer.pre_tokenizer = words
    tokenizer.decoder = decoders.ByteLevel()
    begin = OPT_SPECIAL[2]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{begin} $A", special_tokens=[(begin, vocabulary[begin])]
    )
    GPT2TokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=begin,
        eos_token=begin,
        unk_token=begin,
        pad_token=OPT_SPECIAL[1],
        model_max_length=128,
    ).save_pretrained(folder)
    # tokenizer.json says it all.
    for name in ("vocab.json", "merges.txt"):
        (folder / name).unlink(missing_ok=True)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Rebuilds the three small tokenizers.")
    parser.add_argument("--pictures", type=Path, default=ASSETS / "emoji.array_record")
    parser.add_argument("--output", type=Path, default=ASSETS, help="default: %(default)s")
    args = parser.parse_args(argv)
    texts = read_training_texts(args.pictures)
    build_wordpiece(texts, args.output / "text_tokenizer")
    build_bpe(texts, args.output / "tiny_stable_diffusion" / "tokenizer")
    build_byte_bpe(texts, args.output / "tiny_opt")
    print(f"{args.output}: three tokenizers, from {len(texts):,} captions and tags")


if __name__ == "__main__":
    cli.run(main)
