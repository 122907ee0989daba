"""What a method would get in a model, in the order of the walk, before anything is bound."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from peft_func.errors import OptionError
from peft_func.functional.model import FunctionalModel
from peft_func.functional.walk import walk
from peft_func.report.table import aligned
from peft_func.transforms.first_match import Cap, Claim, FirstMatch, selected
from peft_func.transforms.transform import Chain, Deferred, Method, Part


@dataclass(frozen=True)
class Match:
    """A place, and the pair or part that gets it.

    Attributes:
        path: of the module, or of the parameter.
        class_name: the class of the module, or of the one that owns the parameter.
        cap: the index of the pair of a `pf.first_match`, `1.0` for the first of one nested in the second; "" for a
            part that stands by itself.
        check: the check, or the part's selector.
        method: the names of the parts that come there; "frozen" for None.
        parameters: the names of the parameters that they adapt or train.
    """

    path: str
    class_name: str
    cap: str
    check: str
    method: str
    parameters: tuple[str, ...]


@dataclass(frozen=True)
class Preview:
    """What a method would get; iterate over it, or `print` it.

    Attributes:
        rows: the places, in the order of the walk.
        idle: pairs that get nothing, each as its index and its check: `bind` refuses them.
        count: how many parameters the model has.
    """

    rows: tuple[Match, ...]
    idle: tuple[tuple[str, str], ...]
    count: int

    def __iter__(self) -> Iterator[Match]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __str__(self) -> str:
        cells = [("place", "class", "pair", "check", "method", "parameters")]
        for row in self.rows:
            names = _short(row.path, row.parameters)
            cells.append((row.path or "(the net)", row.class_name, row.cap, row.check, row.method, names))
        lines = [line.rstrip() for line in aligned(cells, "<<<<<<")]
        lines.insert(1, "-" * max(map(len, lines)))
        found = {name for row in self.rows for name in row.parameters}
        lines += [f"pair {cap}, {check}, gets nothing: bind will refuse it" for cap, check in self.idle]
        return "\n".join([*lines, f"{len(found):,} of {self.count:,} parameters; the others stay frozen"])


def preview(method: Method, model: FunctionalModel) -> Preview:
    """Return what each pair of a `pf.first_match`, and each other part of a method, would get; nothing is bound.

    What `pf.bind` would refuse of a `pf.first_match` is shown: a row without parameters, a pair without a row.

    Args:
        method: any method.
        model: what `pf.functionalize` returned.

    Raises:
        OptionError: they are something else.
        SelectorError: another part selects nothing.

    Example:
        >>> import torch, peft_func as pf
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.LayerNorm(4), torch.nn.Linear(4, 2))
        >>> method = pf.first_match((["2"], pf.train), (pf.class_named("Linear"), pf.lora, {"rank": 2}))
        >>> print(pf.preview(method, pf.functionalize(net)))
        place  class   pair  check                  method  parameters
        ----------------------------------------------------------------
        0      Linear  1     class_named('Linear')  lora    weight
        2      Linear  0     ['2']                  train   weight, bias
        3 of 6 parameters; the others stay frozen
    """
    if not isinstance(method, Part | Chain):
        raise OptionError(f"preview takes a method, such as pf.first_match(...), not a {type(method).__name__}")
    if not isinstance(model, FunctionalModel):
        raise OptionError(f"preview takes what pf.functionalize returned, not a {type(model).__name__}")
    return Preview(tuple(_rows(method, model, ("",), "")), tuple(_idle(method, model, ("",), "")), len(model.params))


def _rows(method: Method, model: FunctionalModel, roots: Sequence[str], prefix: str) -> Iterator[Match]:
    if isinstance(method, FirstMatch):
        for claim in method.claims(model, roots):
            cap = method.caps[claim.cap]
            if isinstance(cap.action, FirstMatch):
                yield _match(claim, f"{prefix}{claim.cap}", cap, "first_match", ())
                yield from _rows(cap.action, model, (claim.path,), f"{prefix}{claim.cap}.")
            else:
                placed = cap.method(claim.parameters, () if cap.of_parameter else (claim.path,), model)
                chosen = selected(placed, model)
                names = tuple(name for name in claim.parameters if name in chosen)
                words = ", ".join(_parts(placed, model)) or ("frozen" if cap.action is None else "nothing")
                yield _match(claim, f"{prefix}{claim.cap}", cap, words, names)
    elif isinstance(method, Deferred):
        yield from _rows(method.expand(model), model, roots, prefix)
    elif isinstance(method, Chain):
        for part in method.parts:
            yield from _rows(part, model, roots, prefix)
    else:
        if method.modules:
            known = walk(model._skeleton.root)
            for path in method.resolve(model):
                yield Match(path, known[path].class_name, "", repr(method.where), method.name, ())
            return
        for name in method.resolve(model):
            owner = model.infos[name].modules[0].__name__
            yield Match(name, owner, "", repr(method.where), method.name, (name,))


def _idle(method: Method, model: FunctionalModel, roots: Sequence[str], prefix: str) -> Iterator[tuple[str, str]]:
    """Yield the pairs that get nothing in any of the places where their `first_match` walks."""
    if isinstance(method, FirstMatch):
        claims = method.claims(model, roots)
        for i, cap in enumerate(method.caps):
            own = [claim.path for claim in claims if claim.cap == i]
            if not own:
                yield f"{prefix}{i}", repr(cap.check)
            elif isinstance(cap.action, FirstMatch):
                yield from _idle(cap.action, model, own, f"{prefix}{i}.")
    elif isinstance(method, Chain):
        for part in method.parts:
            yield from _idle(part, model, roots, prefix)


def _match(claim: Claim, number: str, cap: Cap, method: str, parameters: tuple[str, ...]) -> Match:
    return Match(claim.path, claim.class_name, number, repr(cap.check), method, parameters)


def _parts(method: Method, model: FunctionalModel) -> list[str]:
    """Return the names of the parts that select something."""
    if isinstance(method, Chain):
        return [name for part in method.parts for name in _parts(part, model)]
    return [method.name] if selected(method, model) else []


def _short(path: str, names: Sequence[str]) -> str:
    """Return the names below a path, without the path, and no more than four."""
    shown = [name.removeprefix(f"{path}.") for name in names[:4]]
    return ", ".join(shown) + (f", and {len(names) - 4} more" if len(names) > 4 else "")
