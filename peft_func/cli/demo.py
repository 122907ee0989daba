"""`peft-func demo`: an ensemble of adapters on handwritten digits, from pre-training to a plain checkpoint."""

import contextlib
import time
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from torch import Tensor

import peft_func as pf
from peft_func.cli.digits import CLASSES, NEW, Digits, load_digits
from peft_func.cli.export import compare_merged, export_merged
from peft_func.cli.extras import require
from peft_func.cli.figure import DISPUTED, Disputed, Story, write_figure
from peft_func.cli.files import readable_size
from peft_func.cli.scores import Scores, mean_of_probabilities, most_disputed, reliability, score, vote_counts
from peft_func.cli.tables import parameter_table, score_table
from peft_func.cli.train import Curves, Steps, accuracy, draw_members, fit_members, member_log_probs, pretrain
from peft_func.cli.vit import VisionTransformer, vision_transformer
from peft_func.trees.paths import Tree

PRETRAINING_STEPS = 200
FIGURE, MERGED, ADAPTER = "demo.png", "merged.safetensors", "adapter.safetensors"


class Adaptation(str, Enum):
    """What adapts the body of the network; the head trains in any case."""

    LORA = "lora"
    GIFT = "gift"
    BOTH = "both"


def method_for(adaptation: Adaptation) -> pf.Chain:
    """Return the method: LoRA on the attention, GIFT on the MLPs (shared over depth), or both; and the head itself."""
    parts = []
    if adaptation is not Adaptation.GIFT:
        parts.append(pf.lora(["q_proj", "v_proj"], rank=4))
    if adaptation is not Adaptation.LORA:
        parts.append(pf.gift(r".*\.fc[12]", rank=8))
    return pf.chain(*parts, pf.train(r"head\..*"))


def _whole(value: str | int) -> int:
    try:
        return int(value)
    except ValueError:
        raise typer.BadParameter(f"'{value}' is not a whole number.") from None


def _positive(value: str | int) -> int:
    if _whole(value) < 1:
        raise typer.BadParameter(f"'{value}' is less than 1.")
    return int(value)


def _can_be_folder(value: Path) -> Path:
    for path in (value, *value.parents):
        if path.exists() and not path.is_dir():
            raise typer.BadParameter(f"'{value}' cannot be a folder: '{path}' is a file.")
    return value


def demo(
    members: Annotated[int, typer.Option(parser=_positive, metavar="N", help="How many adapters to train.")] = 8,
    steps: Annotated[int, typer.Option(parser=_positive, metavar="N", help="How many steps to train them.")] = 150,
    method: Annotated[Adaptation, typer.Option(help="What adapts the body of the network.")] = Adaptation.BOTH,
    out: Annotated[
        Path, typer.Option(callback=_can_be_folder, help="The folder to write to; made if there is none.")
    ] = Path("peft_func_demo"),
    seed: Annotated[int, typer.Option(parser=_whole, metavar="N", help="The same seed gives the same numbers.")] = 0,
) -> None:
    """Adapt a small vision transformer to new digits, with many adapters trained at once; offline, in half a minute."""
    start = time.perf_counter()
    for module in ("sklearn", "matplotlib", "tqdm"):
        require(module)  # before the work, not after it
    out.mkdir(parents=True, exist_ok=True)
    console = Console(highlight=False)
    with _one_thread():
        _tell(console, members, steps, method, out, seed)
    console.print(f"Total time: {time.perf_counter() - start:.1f} s")


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    # The matrices are so small that threads cost more than they gain, many times more on a machine that is shared;
    # and the order of the summands, thus the last digits, does not depend on how many cores there are.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _tell(console: Console, members: int, steps: int, method: Adaptation, out: Path, seed: int) -> None:
    data = load_digits(pf.split(seed, "data"))
    net = _pretrained(console, data, seed)
    model = pf.functionalize(net)
    adapter = pf.bind(method_for(method), model)
    member_keys = [pf.split(seed, f"member {i}") for i in range(members)]
    frozen, first = draw_members(adapter, member_keys)
    _announce(console, data, adapter, first, members)

    stacked, curves = fit_members(
        adapter, frozen, first, member_keys, data.new, steps=steps, held_out=data.new_test, each=_bar("adapting")
    )
    images, labels = data.new_test.images, data.new_test.labels
    # At init every adapter is the identity, so the first of them speaks for the base.
    base = score(member_log_probs(adapter, frozen, pf.stack(pf.unstack(first)[:1]), images)[0], labels)
    said = member_log_probs(adapter, frozen, stacked, images)
    scores = [score(log_probs, labels) for log_probs in said]
    best = max(range(members), key=lambda i: (scores[i].accuracy, -scores[i].nll))
    ensemble = score(mean_of_probabilities(said), labels)
    console.print()
    console.print(score_table(base, scores, best, ensemble, len(labels)))

    write_figure(out / FIGURE, _story(data, curves, said, base, ensemble, method))
    _export(console, out, adapter, frozen, pf.unstack(stacked)[best], images, pf.split(seed, "fresh"))
    console.print("\nWritten:")
    for name in (FIGURE, MERGED, ADAPTER):
        console.print(f"  {out / name}", markup=False, soft_wrap=True)


def _bar(label: str) -> Steps:
    tqdm = require("tqdm").tqdm
    return lambda steps: tqdm(steps, desc=label, unit="step", disable=None)


def _pretrained(console: Console, data: Digits, seed: int) -> VisionTransformer:
    net = vision_transformer(pf.split(seed, "net"), CLASSES)
    pretrain(net, data.old, pf.split(seed, "pretrain"), steps=PRETRAINING_STEPS, each=_bar("pre-training"))
    with torch.no_grad():
        right = accuracy(net(data.old_test.images), data.old_test.labels).item()
    console.print(
        f"Pre-trained a vision transformer on {len(data.old)} images of the digits 0 to 4: "
        f"{100 * right:.1f} % of {len(data.old_test)} held-out ones are right."
    )
    return net


def _announce(console: Console, data: Digits, adapter: pf.Adapter, first: Tree, members: int) -> None:
    console.print(
        f"Now it adapts to the digits 5 to 9, from {len(data.new)} labelled images ({len(data.new) // CLASSES} of "
        f"each). The head keeps its {CLASSES} outputs: so far they meant 0 to 4, from here on they mean 5 to 9, "
        "so that the base can only guess.\n"
    )
    console.print(parameter_table(pf.table(adapter, pf.unstack(first)[0]), members))


def _story(data: Digits, curves: Curves, said: Tensor, base: Scores, ensemble: Scores, method: Adaptation) -> Story:
    labels, members = data.new_test.labels, len(said)
    mean, votes = mean_of_probabilities(said), vote_counts(said)
    disputed = [
        Disputed(
            data.new_test.images[i],
            NEW[int(labels[i])],
            {NEW[c]: int(votes[i, c]) for c in votes[i].argsort(descending=True, stable=True).tolist() if votes[i, c]},
            bool(mean[i].argmax() == labels[i]),
        )
        for i in most_disputed(said, DISPUTED).tolist()
    ]
    what = {Adaptation.LORA: "LoRA", Adaptation.GIFT: "GIFT", Adaptation.BOTH: "LoRA and GIFT"}[method]
    who = f"1 adapter ({what}) learns" if members == 1 else f"{members} adapters ({what}) learn"
    return Story(
        title=f"{who} the digits 5 to 9 from {len(data.new)} examples",
        curves=curves,
        base=base,
        ensemble=ensemble,
        reliability={
            "members, all together": reliability(said.flatten(0, 1), labels.repeat(members)),
            "ensemble": reliability(mean, labels),
        },
        disputed=disputed,
        members=members,
    )


def _export(
    console: Console, out: Path, adapter: pf.Adapter, frozen: dict[str, Tensor], tree: Tree, images: Tensor, key: int
) -> None:
    """Write the best member as a plain checkpoint and as an adapter, and check the former."""
    weights = adapter.apply(frozen, tree)
    export_merged(out / MERGED, adapter.model, weights)
    fresh = vision_transformer(key, CLASSES)
    found = compare_merged(out / MERGED, fresh, adapter.model, weights, images)
    pf.save(out / ADAPTER, adapter, tree)
    console.print(
        f"\nThe best member, merged into a plain state dict ({readable_size(out / MERGED)}; its adapter alone: "
        f"{readable_size(out / ADAPTER)}) and loaded strictly into a fresh module: {found.same_answers} of "
        f"{found.images} answers are the same, and no logit differs by more than {found.difference:.1e}."
    )
    if not found.equal:
        raise pf.PeftFuncError(
            f"{out / MERGED} does not predict what the adapter does: only {found.same_answers} of {found.images} "
            f"answers are the same (largest difference of a logit: {found.difference:.1e})"
        )
