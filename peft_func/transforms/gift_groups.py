"""Which places share a generator of GIFT: over depth, by selectors, and by the parts of fused weights."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from peft_func.errors import OptionError
from peft_func.functional.model import FunctionalModel
from peft_func.transforms.options import check_choice, check_rank
from peft_func.trees.select import Where, as_selector

Share: TypeAlias = str | Mapping[str, Where]
Names: TypeAlias = Sequence[str | None]
Chunks: TypeAlias = Names | Mapping[str, Names]
_WHOLE = ""  # the name of the one part of a weight that is not taken apart


@dataclass(frozen=True)
class Site:
    """Rows of a matrix, and the group whose generator they use."""

    group: str
    start: int
    stop: int


@dataclass(frozen=True)
class Group:
    """A generator: the first place that uses it, the width of its matrices, and its number of rows there."""

    path: str
    width: int
    rows: int


def check_share(method: str, share: Share) -> None:
    """Refuse what is no way to share.

    Raises:
        OptionError: names the ways.
    """
    if not isinstance(share, Mapping):
        check_choice(method, "share", share, ("target", "all", "none"))


def check_chunks(chunks: Chunks | None) -> Any:
    """Return `chunks` as JSON.

    Raises:
        OptionError: it is neither names and None, nor a dict of such.
    """
    if chunks is None:
        return None
    if isinstance(chunks, Mapping):
        return {str(target): _names(names) for target, names in chunks.items()}
    return _names(chunks)


def _names(names: Any) -> list[str | None]:
    if isinstance(names, str) or not isinstance(names, Sequence) or not all(
        name is None or (isinstance(name, str) and name) for name in names
    ):  # fmt: skip
        raise OptionError(f"gift: chunks={names!r} are names of equal parts, and None, such as ('q', None, 'v')")
    if not any(names):
        raise OptionError(f"gift: chunks={names!r} name no part; leave the place out of where instead")
    return list(names)


def base_groups(method: str, paths: tuple[str, ...], share: Share, model: FunctionalModel) -> dict[str, str]:
    """Return the group of every place, before fused weights are taken apart.

    Raises:
        OptionError: a place is in no group of `share`, or in two; or a group has no place.
    """
    groups = {path: _group(method, path, share, model) for path in paths}
    for group, where in share.items() if isinstance(share, Mapping) else ():
        if group not in groups.values():
            raise OptionError(f"{method}: the group {group!r} of share, {where!r}, has none of {', '.join(paths[:5])}")
    return groups


def _group(method: str, path: str, share: Share, model: FunctionalModel) -> str:
    if share == "all":
        return "all"
    if share == "none":
        return path
    if isinstance(share, str):
        module, _, weight = path.rpartition(".")
        target = module.rpartition(".")[2] or weight
        # A module with several matrices (packed attention, experts) has as many targets.
        return target if weight == "weight" or not module else f"{target}.{weight}"
    info = model.infos[path]
    found = [group for group, where in share.items() if as_selector(where)(path, info)]
    if len(found) != 1:
        raise OptionError(
            f"{method}: {path} must be in one group of share, and is in {found or 'none'} of {list(share)}"
        )
    return found[0]


def sites_of(
    groups: Mapping[str, str], share: Share, chunks: Names | Mapping[str, Names] | None, model: FunctionalModel
) -> dict[str, tuple[Site, ...]]:
    """Return the rows of every place that have a generator, and which.

    Raises:
        OptionError: a weight has no such equal parts, or a target of `chunks` is no place, or two are the same.
    """
    named: dict[str, tuple[str, str | None]] = {}
    sites: dict[str, tuple[Site, ...]] = {}
    used: set[str] = set()
    for path, group in groups.items():
        names = _chunks_at(path, chunks, model, used)
        rows = model.layouts[path].matrix_shape[-2]
        size, rest = divmod(rows, len(names))
        if rest:
            raise OptionError(f"gift: {path} has {rows} rows, which are no {len(names)} equal parts: chunks={names!r}")
        found = []
        for i, name in enumerate(names):
            part = None if share == "all" or name == _WHOLE else name
            own = group if part is None else f"{group}.{part}"
            if named.setdefault(own, (group, part)) != (group, part):
                raise OptionError(
                    f"gift: {own!r} is the name of two groups; call the part {name!r} of {path} otherwise"
                )
            if name is not None:
                found.append(Site(own, i * size, (i + 1) * size))
        sites[path] = tuple(found)
    for target in chunks if isinstance(chunks, Mapping) else ():
        if target not in used:
            raise OptionError(f"gift: {target!r} of chunks is none of the selected places: {', '.join(sites)}"[:400])
    return sites


def _chunks_at(path: str, chunks: Any, model: FunctionalModel, used: set[str]) -> Names:
    if not isinstance(chunks, Mapping):
        return chunks or (_WHOLE,)
    found = [target for target in chunks if as_selector([target])(path, model.infos[path])]
    if len(found) > 1:
        raise OptionError(f"gift: {path} is in {len(found)} targets of chunks: {', '.join(found)}")
    used.update(found)
    return chunks[found[0]] if found else (_WHOLE,)


def groups_of(
    sites: Mapping[str, tuple[Site, ...]], rank: int, model: FunctionalModel, *, mixes_tokens: bool
) -> dict[str, Group]:
    """Return the groups, after checking that the places of each fit together.

    Raises:
        OptionError: places of different width in one group, or of different heights where the block mixes tokens; or
            a rank that a matrix cannot have.
    """
    groups: dict[str, Group] = {}
    for path, own in sites.items():
        width = model.layouts[path].matrix_shape[-1]
        for site in own:
            rows = site.stop - site.start
            first = groups.setdefault(site.group, Group(path, width, rows))
            if width != first.width:
                raise OptionError(
                    f"gift: {first.path} has {first.width} inputs and {path} has {width}, but both share phi and psi "
                    f"in the group {site.group!r}; give each its own with share='none', or share={{group: selector}} "
                    "by width"
                )
            if mixes_tokens and rows != first.rows:
                raise OptionError(
                    f"gift: {first.path} has {first.rows} outputs and {path} has {rows}, but both share the mlp_mixer "
                    f"of the group {site.group!r}, which mixes outputs; give each its own with share='none', or choose "
                    "a block whose leaves do not depend on them"
                )
            check_rank("gift", path, rank, (rows, width))
    return groups
