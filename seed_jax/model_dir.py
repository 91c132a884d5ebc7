"""Model directories: `config.json`, orbax parameters, tokenizer files. Written whole or not at all.

DIR/config.json        kind, sizes, content hash, and the size of every file
DIR/params/            orbax checkpoint of the parameters
DIR/text_tokenizer/    what `transformers.AutoTokenizer` loads
"""

import contextlib
import dataclasses
import hashlib
import json
import shutil
import types
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax import nnx
from jax.sharding import SingleDeviceSharding

from seed_jax.cli import UserError
from seed_jax.models.layers import Compute

C = TypeVar("C")
M = TypeVar("M", bound=nnx.Module)
FORMAT = 1


def save(
    path: Path,
    *,
    kind: str,
    config: Any,
    module: nnx.Module,
    add_files: Callable[[Path], object] | None = None,
    **facts: Any,
) -> None:
    """Writes a model directory, replacing the one that is there only once the new one is whole.

    Args:
      kind: what the directory holds, such as 'seed_tokenizer'.
      config: the model's config, a dataclass.
      add_files: writes further files (tokenizers) into the folder it is given.
      facts: further entries of `config.json`.
    """
    params = flat_params(nnx.state(module, nnx.Param))
    with replaced_when_whole(path) as partial:
        with _checkpointer() as checkpointer:
            checkpointer.save(partial / "params", params)
        if add_files is not None:
            add_files(partial)
        description = {
            "format": FORMAT,
            "kind": kind,
            "config": dataclasses.asdict(config),
            **facts,
            "content_hash": content_hash(params),
            "files": file_sizes(partial),
        }
        (partial / "config.json").write_text(json.dumps(description, indent=2) + "\n")


def _checkpointer() -> ocp.StandardCheckpointer:
    """One that waits for no other process: the first alone writes, and each reads its own part."""
    me = jax.process_index()
    return ocp.StandardCheckpointer(
        multiprocessing_options=ocp.options.MultiprocessingOptions(
            primary_host=me, active_processes={me}, barrier_sync_key_prefix=str(me)
        )
    )


@contextlib.contextmanager
def replaced_when_whole(path: Path) -> Iterator[Path]:
    """An empty folder to write into; it takes the place of `path` if the block ends well."""
    path = Path(path).absolute()
    partial = path.with_name(f".{path.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    yield partial
    if path.exists():
        old = path.with_name(f".{path.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        path.rename(old)
        partial.rename(path)
        shutil.rmtree(old)
    else:
        partial.rename(path)


def describe(path: str | Path) -> dict[str, Any]:
    """What `config.json` says, after checking that every file it lists is there and whole.

    Raises:
      UserError: no such directory, or a file is missing, cut short, or no JSON.
    """
    path = Path(path)
    file = path / "config.json"
    if not file.is_file():
        what = f"{file} is missing" if path.is_dir() else f"no such directory: {path}"
        raise UserError(f"{what}; a model directory is what seed_jax.train writes to WORKDIR/model")
    try:
        description = json.loads(file.read_text())
        listed = dict(description["files"])
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{file} is not a seed_jax model description") from None
    for problem in wrong_sizes(path, listed):
        raise UserError(f"{problem}; copy the model directory again, whole")
    if description.get("format") != FORMAT:
        raise UserError(
            f"{file} is of format {description.get('format')}; this version reads {FORMAT}"
        )
    return description


def file_sizes(folder: Path) -> dict[str, int]:
    """Bytes of every file below a folder, by its path there."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    return {str(file.relative_to(folder)): file.stat().st_size for file in files}


def wrong_sizes(folder: Path, listed: dict[str, int]) -> Iterator[str]:
    """Says of each listed file that is missing or of another size what is wrong with it."""
    for name, size in listed.items():
        file = folder / name
        if not file.is_file():
            yield f"{file} is missing"
        elif file.stat().st_size != size:
            yield f"{file} has {file.stat().st_size} bytes where {size} were written"


def describe_kind(path: str | Path, kind: str) -> dict[str, Any]:
    """`describe`, and a UserError if the directory holds another kind of model."""
    description = describe(path)
    if description["kind"] != kind:
        raise UserError(f"{path} holds a {description['kind']} model, not a {kind} model")
    return description


def load_config(path: str | Path, kind: str, config_class: type[C]) -> C:
    """The config of the model in a directory.

    Raises:
      UserError: as `describe`, or the directory holds another kind of model.
    """
    return from_dict(config_class, describe_kind(path, kind)["config"])


def load(
    path: str | Path,
    kind: str,
    config_class: type[Any],
    module_class: Callable[..., M],
    compute: Compute,
    *,
    stored: Any = None,
) -> M:
    """Builds the module that a directory describes, with its parameters on the first device.

    Args:
      stored: the type that holds the parameters; None: the one that the module makes them in.

    Raises:
      UserError: see `load_config`; or the parameters do not fit the config.
    """
    config = load_config(path, kind, config_class)
    abstract = nnx.eval_shape(lambda: module_class(config, compute=compute, rngs=nnx.Rngs(0)))
    graphdef, state = nnx.split(abstract)
    device = SingleDeviceSharding(jax.local_devices()[0])
    target = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, stored or a.dtype, sharding=device),
        flat_params(state),
    )
    return nnx.merge(graphdef, unflatten_params(state, restore_params(path, target)))


def load_into(module: nnx.Module, path: str | Path, kind: str) -> None:
    """Replaces a module's parameters by a directory's, keeping shardings and types.

    Raises:
      UserError: see `load_config`; or the parameters do not fit the module.
    """
    describe_kind(path, kind)
    state = nnx.state(module, nnx.Param)
    target = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), flat_params(state)
    )
    nnx.update(module, unflatten_params(state, restore_params(path, target)))


def replace_params(module: nnx.Module, params: nnx.State) -> None:
    """Puts `params` in the place of a module's, keeping shardings and types."""
    placed = jax.tree.map(
        lambda new, old: jax.device_put(new.astype(old.dtype), old.sharding),
        params,
        nnx.state(module, nnx.Param),
    )
    nnx.update(module, placed)


def restore_params(
    path: str | Path, target: dict[str, jax.ShapeDtypeStruct]
) -> dict[str, jax.Array]:
    """The parameters named in `target`, in its shapes, types and shardings.

    Raises:
      UserError: a parameter is missing, unexpected or of another shape.
    """
    folder = Path(path).absolute() / "params"
    try:
        with _checkpointer() as checkpointer:
            stored = checkpointer.metadata(folder).item_metadata.tree
            check_params(path, {k: v.shape for k, v in stored.items()}, target)
            return checkpointer.restore(folder, target)
    except (ValueError, OSError, KeyError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{folder} can't be read: {reason}") from error


def check_params(
    path: str | Path, stored: dict[str, tuple], target: dict[str, jax.ShapeDtypeStruct]
) -> None:
    """Raises a UserError that names every parameter that does not fit."""
    problems = [f"{k} is missing" for k in sorted(target.keys() - stored.keys())]
    problems += [f"{k} is unexpected" for k in sorted(stored.keys() - target.keys())]
    problems += [
        f"{k} is {tuple(stored[k])}, not {target[k].shape}"
        for k in sorted(stored.keys() & target.keys())
        if tuple(stored[k]) != target[k].shape
    ]
    if problems:
        raise UserError(f"{path} does not fit its config: {'; '.join(problems)}")


def flat_params(state: nnx.State) -> dict[str, Any]:
    """Arrays by path, such as 'encoder/vit/patch_embed/kernel'."""
    return {"/".join(map(str, path)): leaf.get_value() for path, leaf in nnx.to_flat_state(state)}


def unflatten_params(state: nnx.State, flat: dict[str, Any]) -> nnx.State:
    """`state` with the arrays of `flat`, which holds one for each of its paths."""
    return nnx.from_flat_state(
        (path, leaf.replace(flat["/".join(map(str, path))]))
        for path, leaf in nnx.to_flat_state(state)
    )


def content_hash(params: dict[str, jax.Array]) -> str:
    """SHA-256 of names, types, shapes and values: the same for the same weights, however stored."""
    digest = hashlib.sha256()
    for name in sorted(params):
        array = np.asarray(params[name])
        digest.update(f"{name} {array.dtype} {array.shape}\n".encode())
        digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def from_dict(config_class: type[C], values: dict[str, Any], name: str = "config") -> C:
    """A config dataclass from nested dicts; fields that are left out keep their defaults.

    Raises:
      UserError: a field that does not exist; the message says what does.
    """
    hints = typing.get_type_hints(config_class)
    known = {f.name for f in dataclasses.fields(config_class)}  # type: ignore[arg-type]
    arguments = {}
    for key, value in values.items():
        if key not in known:
            raise UserError(f"{name}.{key} does not exist; {name} has {', '.join(sorted(known))}")
        hint = hints[key]
        if isinstance(hint, types.UnionType):
            hint = next(t for t in typing.get_args(hint) if t is not type(None))
        nested = dataclasses.is_dataclass(hint) and isinstance(value, dict)
        # JSON knows no tuples.
        plain = tuple(value) if isinstance(value, list) else value
        arguments[key] = from_dict(hint, value, f"{name}.{key}") if nested else plain
    return config_class(**arguments)
