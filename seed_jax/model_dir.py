"""Model directories: `config.json`, orbax parameters, tokenizer files. Written whole or not at all.

DIR/config.json        kind, sizes, content hash, and the size of every file
DIR/params/            orbax checkpoint of the parameters
DIR/text_tokenizer/    what `transformers.AutoTokenizer` loads
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import math
import types
import typing
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

from seed_jax import files
from seed_jax.cli import UserError, first_line
from seed_jax.lazy import LazyTensor
from seed_jax.models.layers import Compute

C = TypeVar("C")
M = TypeVar("M", bound=nnx.Module)
FORMAT = 1
READ_AT_ONCE = 2**26  # bytes; a larger parameter is read alone


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
    with files.replaced_when_whole(path) as partial:
        with _checkpointer() as checkpointer:
            checkpointer.save(partial / "params", ocp.args.PyTreeSave(params))
        if add_files is not None:
            add_files(partial)
        description = {
            "format": FORMAT,
            "kind": kind,
            "config": dataclasses.asdict(config),
            **facts,
            "content_hash": content_hash(params),
            "files": files.file_sizes(partial),
        }
        (partial / "config.json").write_text(json.dumps(description, indent=2) + "\n")


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
    for problem in files.wrong_sizes(path, listed):
        raise UserError(f"{problem}; copy the model directory again, whole")
    if description.get("format") != FORMAT:
        raise UserError(
            f"{file} is of format {description.get('format')}; this version reads {FORMAT}"
        )
    return description


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
    device: jax.Device | None = None,
) -> M:
    """Builds the module that a directory describes, with its parameters on one device.

    Args:
      stored: the type that holds the parameters but `exact` ones; None: the one that the module
        makes them in.
      device: None: the first.

    Raises:
      UserError: see `load_config`; or the parameters do not fit the config.
    """
    config = load_config(path, kind, config_class)
    abstract = nnx.eval_shape(lambda: module_class(config, compute=compute, rngs=nnx.Rngs(0)))
    graphdef, state = nnx.split(abstract)
    sharding = SingleDeviceSharding(device or jax.local_devices()[0])
    target = {
        _name(path): jax.ShapeDtypeStruct(
            param.shape,
            stored if stored and not param.get_metadata().get("exact") else param.dtype,
            sharding=sharding,
        )
        for path, param in nnx.to_flat_state(state)
    }
    return nnx.merge(graphdef, unflatten_params(state, restore_params(path, target)))


def load_into(module: nnx.Module, path: str | Path, kind: str, *, all_of_it: bool = True) -> None:
    """Replaces a module's parameters by a directory's, keeping shardings and types.

    Args:
      all_of_it: False: the directory may hold more than the module has.

    Raises:
      UserError: see `load_config`; or the parameters do not fit the module.
    """
    describe_kind(path, kind)
    state = nnx.state(module, nnx.Param)
    target = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), flat_params(state)
    )
    loaded = restore_params(path, target, all_of_it=all_of_it)
    nnx.update(module, unflatten_params(state, loaded))


def load_part(
    module: nnx.Module, path: str | Path, kind: str, *, tables: Collection[str] = ()
) -> set[str]:
    """As `load_into`, but the directory may hold fewer parameters than the module.

    Args:
      tables: parameters of which it may hold the first rows alone.

    Returns:
      the names of those that were replaced, as in `flat_params`.
    """
    describe_kind(path, kind)
    state = nnx.state(module, nnx.Param)
    flat = flat_params(state)
    target, short = {}, set()
    for name, shape in stored_shapes(path).items():
        if name not in flat:
            raise UserError(f"{path} holds {name}, which the model has no place for")
        old = flat[name]
        target[name] = jax.ShapeDtypeStruct(old.shape, old.dtype, sharding=old.sharding)
        if name in tables and shape[1:] == old.shape[1:] and shape[0] < old.shape[0]:
            short.add(name)
            # Its rows may not divide by the mesh as the module's do.
            whole = (
                NamedSharding(old.sharding.mesh, PartitionSpec())
                if isinstance(old.sharding, NamedSharding)
                else old.sharding
            )
            target[name] = jax.ShapeDtypeStruct(shape, old.dtype, sharding=whole)
    loaded = restore_params(path, target)
    for name in short:
        old, rows = flat[name], loaded[name]
        loaded[name] = jax.device_put(old.at[: len(rows)].set(rows), old.sharding)
    nnx.update(module, unflatten_params(state, flat | loaded))
    return set(loaded)


def replace_params(module: nnx.Module, params: nnx.State) -> None:
    """Puts `params` in the place of a module's, keeping shardings and types."""
    placed = jax.tree.map(
        lambda new, old: jax.device_put(new.astype(old.dtype), old.sharding),
        params,
        nnx.state(module, nnx.Param),
    )
    nnx.update(module, placed)


def restore_params(
    path: str | Path, target: dict[str, jax.ShapeDtypeStruct], *, all_of_it: bool = True
) -> dict[str, jax.Array]:
    """The parameters named in `target`, in its shapes, types and shardings.

    Raises:
      UserError: a parameter is missing, of another shape or, of `all_of_it`, unexpected.
    """
    stored = stored_shapes(path)
    kept = {name: shape for name, shape in stored.items() if all_of_it or name in target}
    check_params(path, kept, target)
    restored: dict[str, jax.Array] = {}
    for part in _parts(target):
        restored |= _restore(path, part)
    return restored


def lazy_params(path: str | Path, params: nnx.State) -> dict[str, LazyTensor]:
    """A directory's parameters by name, each of which is read when it is asked for.

    Only the last one that was read stays in memory.

    Args:
      params: the state of an abstract module.

    Raises:
      UserError: a parameter is missing, unexpected or of another shape.
    """
    device = SingleDeviceSharding(jax.local_devices()[0])
    target = {
        name: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=device)
        for name, a in flat_params(params).items()
    }
    check_params(path, stored_shapes(path), target)
    held: dict[str, np.ndarray] = {}

    def read(name: str) -> np.ndarray:
        if name not in held:
            held.clear()
            held[name] = np.asarray(_restore(path, {name: target[name]})[name])
        return held[name]

    return {
        name: LazyTensor(a.shape, np.dtype(a.dtype), functools.partial(read, name))
        for name, a in target.items()
    }


def _restore(path: str | Path, target: dict[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
    arguments = ocp.checkpoint_utils.construct_restore_args(target)
    with _open_params(path) as (checkpointer, folder):
        return checkpointer.restore(
            folder, ocp.args.PyTreeRestore(target, arguments, partial_restore=True)
        )


def _parts(target: dict[str, jax.ShapeDtypeStruct]) -> Iterator[dict[str, jax.ShapeDtypeStruct]]:
    """What to read at once: as much as is in the way while it is read.

    The largest come first, when there is most room; later ones add little.
    """
    part: dict[str, jax.ShapeDtypeStruct] = {}
    size = 0
    for name in sorted(target, key=lambda name: (-_bytes(target[name]), name)):
        if part and size + _bytes(target[name]) > READ_AT_ONCE:
            yield part
            part, size = {}, 0
        part[name] = target[name]
        size += _bytes(target[name])
    if part:
        yield part


def _bytes(array: jax.ShapeDtypeStruct) -> int:
    return math.prod(array.shape) * array.dtype.itemsize


def _checkpointer() -> ocp.Checkpointer:
    """One that waits for no other process: the first alone writes, and each reads its own part."""
    me = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(
        primary_host=me, active_processes={me}, barrier_sync_key_prefix=str(me)
    )
    # Weights hardly compress; as they are, they go to the disk without a copy in memory.
    handler = ocp.PyTreeCheckpointHandler(use_compression=False, multiprocessing_options=alone)
    return ocp.Checkpointer(handler, multiprocessing_options=alone)


def stored_shapes(path: str | Path) -> dict[str, tuple[int, ...]]:
    """The shapes of a directory's parameters by name."""
    with _open_params(path) as (checkpointer, folder):
        stored = checkpointer.metadata(folder).item_metadata.tree
        return {name: tuple(value.shape) for name, value in stored.items()}


@contextlib.contextmanager
def _open_params(path: str | Path) -> Iterator[tuple[ocp.Checkpointer, Path]]:
    folder = Path(path).absolute() / "params"
    try:
        with _checkpointer() as checkpointer:
            yield checkpointer, folder
    except (ValueError, OSError, KeyError) as error:
        reason = first_line(error)
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
    return {_name(path): leaf.get_value() for path, leaf in nnx.to_flat_state(state)}


def _name(path: tuple) -> str:
    return "/".join(map(str, path))


def unflatten_params(state: nnx.State, flat: dict[str, Any]) -> nnx.State:
    """`state` with the arrays of `flat`, which holds one for each of its paths."""
    return nnx.from_flat_state(
        (path, leaf.replace(flat[_name(path)])) for path, leaf in nnx.to_flat_state(state)
    )


def content_hash(params: Mapping[str, Any]) -> str:
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
