"""Pictures from texts: the language model writes codes, and Stable Diffusion draws from them.

Shapes: B texts of a batch, P texts, E features.
"""

import textwrap
from functools import partial
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from seed_jax import drawing
from seed_jax.data import transforms
from seed_jax.data.text import choose_caption
from seed_jax.drawing import Shown
from seed_jax.evaluation import fid, intervals, tables
from seed_jax.evaluation.reconstruction import another
from seed_jax.evaluation.suite import Evaluation, Measured
from seed_jax.models.tokenizer import SeedTokenizer
from seed_jax.pieces import Arrays, below, join

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
    inception = evaluation.inception
    embed = runner.compile(SeedTokenizer.embed)
    texts = [choose_caption(source[index], None, 0) for index in range(len(source))]
    others = another(len(texts))
    size = runner.batch_size(min(args.batch_size, len(texts)))
    kept = evaluation.pieces("drawing")

    def piece(start: int) -> Arrays:
        count = min(size, len(texts) - start)
        # Padded, so that one shape is compiled.
        rows = np.minimum(start + np.arange(size), start + count - 1)
        asked = [texts[row] for row in rows]
        codes_BQ = model.draw(asked, seed=start)
        drawn = np.asarray(diffusion.draw(embed(codes_BQ), first=start, **drawing.settings(args)))
        originals = [transforms.decode(source[int(row)]["image"]) for row in rows]
        drawn_BE = encoder.pictures(map(Image.fromarray, drawn))
        text_BE = encoder.texts(asked)
        other_BE = encoder.texts([texts[others[row]] for row in rows])
        arrays = {
            "values/drawn": np.sum(text_BE * drawn_BE, axis=-1),
            "values/shuffled": np.sum(other_BE * drawn_BE, axis=-1),
            "values/picture": np.sum(text_BE * encoder.pictures(originals), axis=-1),
            "values/whole": model.draws_whole(asked, seed=start).astype(float),
        }
        if inception:
            seen = [transforms.resize(original, drawn.shape[1]) for original in originals]
            arrays["features/originals"] = inception(np.stack(seen))
            arrays["features/drawn"] = inception(drawn)
        arrays = {name: array[:count] for name, array in arrays.items()}
        return arrays | {"drawings": drawn[:count][: max(0, ON_SHEET - start)]}

    starts = range(0, len(texts), size)
    with tqdm(starts, unit="batch", desc="drawings", dynamic_ncols=True) as bar:
        found = join([kept(f"{start:07}", partial(piece, start)) for start in bar])
    figures, spans = intervals.of_means(below(found, "values"))
    figures |= {
        "texts": len(texts),
        "encoder": encoder.name,
        "clip": encoder.clip,
        "intervals": spans,
        **fid.figures(below(found, "features"), "originals"),
    }
    shown = [
        Shown(textwrap.shorten(text, 40), {"": picture})
        for text, picture in zip(texts, found["drawings"], strict=False)
    ]
    return Measured(figures, evaluation.benchmark, {"drawing": shown})


def table(found: dict[str, Any]) -> str:
    """Similarity to the text, a row each, and the share of well-formed drawings."""
    spans = found["intervals"]
    rows = [[told, tables.figure(found[row], spans[row], digits=3)] for row, told in ROWS.items()]
    whole = tables.figure(found["whole"], spans["whole"], percent=True)
    told = (
        f"{found['texts']} texts, compared by the {found['encoder']}. Held to no form, the model "
        f"writes a whole picture and nothing else {whole} % of the time."
    )
    head = ["mean cosine to the text", ""]
    return "\n\n".join(
        [
            tables.markdown(head, rows),
            *fid.tables_of(found, ROWS),
            told,
            *tables.left_out(found),
        ]
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
        *fid.headline(found, "drawn", "drawings from texts"),
    ]
