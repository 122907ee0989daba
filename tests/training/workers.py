"""What the processes of the distributed tests run; `python -m tests.training.workers FOLDER` is one of torchrun's."""

import copy
import os
import sys
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import peft_func as pf
from tests import zoo
from tests.training.tiny import curve, rows, seeded, trained

STEPS = 6
SHARE = 4  # rows of each process in a step
LANGUAGE = pf.chain(pf.lora(["q_proj", "v_proj"], rank=2), pf.train(["norm"]))
TRAINER = {"train_sampling_strategy": "sequential", "max_steps": STEPS, "weight_decay": 0.1}


def strict():
    """Make warnings errors, as the tests do; the library of processes warns about itself."""
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", "`torch.jit.* is deprecated", DeprecationWarning)
    torch.set_num_threads(1)


def steps(module, data, *, accumulate=1):
    """Train with SGD of momentum and clipping on `[steps, batch, ...]`; return the losses."""
    optimizer = torch.optim.SGD(module.parameters(), lr=0.3, momentum=0.9)
    losses = []
    for number, (inputs, labels) in enumerate(zip(*data, strict=True)):
        last = (number + 1) % accumulate == 0
        if isinstance(module, DistributedDataParallel) and not last:
            with module.no_sync():
                loss = loss_of(module, inputs, labels)
                (loss / accumulate).backward()
        else:
            loss = loss_of(module, inputs, labels)
            (loss / accumulate).backward()
        losses.append(loss.item())
        if last:
            torch.nn.utils.clip_grad_norm_(module.parameters(), 0.5)
            optimizer.step()
            optimizer.zero_grad()
    return losses


def loss_of(module, inputs, labels):
    output = module(inputs)
    return torch.nn.functional.cross_entropy(getattr(output, "logits", output), labels)


def share(rank, module, data, folder, options, accumulate):
    """Train one share of every batch, in one of two processes."""
    strict()
    module = copy.deepcopy(module)  # what comes from another process shares its memory
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    try:
        if rank:  # DDP sends the first process's values
            with torch.no_grad():
                for param in module.parameters():
                    param.add_(1)
        ours = tuple(part.chunk(2, dim=1)[rank] for part in data)
        losses = steps(DistributedDataParallel(module, **options), ours, accumulate=accumulate)
        torch.save({"losses": losses, "state": module.state_dict()}, Path(folder, f"{rank}.pt"))
        if isinstance(module, pf.Adapted):
            assert all(value.is_shared() for value in module.frozen.values())  # one copy of the base for all
            torch.save(module.merged_state_dict(), Path(folder, f"merged-{rank}.pt"))
    finally:
        dist.destroy_process_group()


def run_trainer(folder, batch, **options):
    """Train with the Trainer, in one process or in one of torchrun's."""
    # Of BERT's loss, a mean over the process's own rows, Trainer believes that it is one over those of all processes.
    net = seeded(zoo.llama).double()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    run = trained(
        pf.Adapted(net, LANGUAGE, 3), rows(64, 0, language=True), per_device_train_batch_size=batch, folder=folder,
        save_strategy="steps", save_steps=STEPS, **TRAINER, **options,
    )  # fmt: skip
    found = run.evaluate(rows(16, 1, language=True))["eval_loss"]
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    world = dist.get_world_size() if dist.is_initialized() else 1
    return {"curve": curve(run), "state": run.model.state_dict(), "world": world, "eval": found}


if __name__ == "__main__":
    strict()
    place = Path(sys.argv[1])
    result = run_trainer(place / "run", SHARE, ddp_backend="gloo", ddp_find_unused_parameters=False)
    torch.save(result, place / f"{os.environ['RANK']}.pt")
    dist.destroy_process_group()
