"""Pictures from texts: the language model writes codes, and Stable Diffusion draws from them.

Shapes: B texts of a batch, P texts, E features.
"""

import textwrap
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from seed_jax import drawing
from seed_jax.data import transforms
from seed_jax.data.text import choose_caption
from seed_jax.drawing import Shown
from seed_jax.evaluation import intervals, tables
from seed_jax.evaluation.reconstruction import another
from seed_jax.evaluation.suite import Evaluation, Measured
from seed_jax.models.tokenizer import SeedTokenizer

ROWS = {
    "drawn": "drawn from the text",
    "shuffled": "drawn from another text: what to expect of chance",
    "picture": "the picture that the text was written of: what to hope for",
}
ON_SHEET = 32


def evaluate(evaluation: Evaluation) -> Measured:
    """How alike texts and their drawings are, and how many are well formed.

    A drawing is well formed when the model, held to nothing, writes a picture and nothing else:
    its beginning, as many codes as there are to a picture, its end. What is drawn and compared is
    held to that form.
    """
    args, source, model = evaluation.args, evaluation.few, evaluation.seed_opt
    runner, diffusion, encoder = evaluation.runner, evaluation.diffusion, evaluation.encoder
    embed = runner.compile(SeedTokenizer.embed)
    texts = [choose_caption(source[index], None, 0) for index in range(len(source))]
    others = another(len(texts))
    size = runner.batch_size(min(args.batch_size, len(texts)))
    journal = evaluation.journal("drawing")
    begin = len(journal.rows) // size * size
    shown: list[Shown] = []
    with tqdm(total=len(texts), initial=begin, unit="text", desc="drawings") as bar:
        for start in range(begin, len(texts), size):
            count = min(size, len(texts) - start)
            # Padded, so that one shape is compiled.
            rows = np.minimum(start + np.arange(size), start + count - 1)
            asked = [texts[row] for row in rows]
            codes_BQ = model.draw(asked, seed=start)
            whole_B = model.draws_whole(asked, seed=start)
            pictures = np.asarray(
                diffusion.draw(embed(codes_BQ), first=start, **drawing.settings(args))
            )
            drawn_BE = encoder.pictures(map(Image.fromarray, pictures))
            text_BE = encoder.texts(asked)
            other_BE = encoder.texts([texts[others[row]] for row in rows])
            originals = [source[int(row)]["image"] for row in rows]
            original_BE = encoder.pictures(map(transforms.decode, originals))
            similarity = {
                "drawn": np.sum(text_BE * drawn_BE, axis=-1),
                "shuffled": np.sum(other_BE * drawn_BE, axis=-1),
                "picture": np.sum(text_BE * original_BE, axis=-1),
            }
            journal.add(
                {"id": str(start + place), "whole": bool(whole_B[place])}
                | {row: float(values[place]) for row, values in similarity.items()}
                for place in range(count)
            )
            shown += [
                Shown(textwrap.shorten(text, 40), {"": picture})
                for text, picture in zip(asked[:count], pictures, strict=False)
            ]
            del shown[ON_SHEET:]
            bar.update(count)
    values = {
        row: np.array([entry[row] for entry in journal.rows.values()], float)
        for row in [*ROWS, "whole"]
    }
    figures, spans = intervals.of_means(values)
    figures |= {
        "texts": len(texts),
        "encoder": encoder.name,
        "clip": encoder.clip,
        "intervals": spans,
    }
    return Measured(figures, evaluation.benchmark, {"drawing": shown} if shown else {})


def table(found: dict[str, Any]) -> str:
    """Similarity to the text, a row each, and the share of well-formed drawings."""
    spans = found["intervals"]
    rows = [[told, tables.figure(found[row], spans[row], digits=3)] for row, told in ROWS.items()]
    whole = tables.figure(found["whole"], spans["whole"], percent=True)
    return (
        tables.markdown(["mean cosine to the text", ""], rows)
        + f"\n\n{found['texts']} texts, compared by the {found['encoder']}. Held to no form, the "
        f"model writes a whole picture and nothing else {whole} % of the time."
    )


def headline(found: dict[str, Any]) -> list[tables.Line]:
    spans = found["intervals"]
    return [
        tables.Line(
            "similarity of drawings to their texts",
            tables.figure(found["drawn"], spans["drawn"], digits=3),
        ),
        tables.Line(
            "well-formed drawings, %", tables.figure(found["whole"], spans["whole"], percent=True)
        ),
    ]
