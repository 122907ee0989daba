"""Peak memory against allocations that are known."""

import pytest
import torch
from torch import Tensor, nn

import peft_func as pf


def bytes_of(count: int) -> Tensor:
    return torch.empty(count, dtype=torch.uint8)


def test_the_most_that_is_held_at_once_and_what_the_result_holds():
    def call() -> Tensor:
        first, second = bytes_of(1_000_000), bytes_of(3_000_001)
        del first
        third = bytes_of(2_500_000)
        return third if second.numel() else second

    assert pf.peak_memory(call, device="cpu") == (5_500_001, 2_500_000, torch.device("cpu"))


def test_what_is_there_before_counts_neither_while_it_is_there_nor_when_it_goes():
    there = bytes_of(2_000_000)
    assert pf.peak_memory(lambda: there, device="cpu")[:2] == (0, 0)
    held: list[Tensor] = []
    pf.peak_memory(lambda: held.append(bytes_of(1_000_000)), device="cpu")  # torch remembers the size of this block

    def call() -> Tensor:
        held.clear()
        return bytes_of(3_000_000)

    assert pf.peak_memory(call, device="cpu")[:2] == (3_000_000, 3_000_000)


def test_what_autograd_saves_is_held_until_backward():
    x = torch.ones(1000, requires_grad=True)

    def step(depth: int) -> None:
        y = x
        for _ in range(depth):
            y = y.exp()  # its output is saved
        y.sum().backward()

    step(1)
    x.grad = None
    first = pf.peak_memory(lambda: step(4), device="cpu")
    assert first.kept == x.nbytes  # the gradient stays
    second, deeper = (pf.peak_memory(lambda d=d: step(d), device="cpu") for d in (4, 24))
    assert second.kept == deeper.kept == 0
    assert deeper.peak - second.peak == 20 * x.nbytes


def test_a_linear_step_by_hand():
    net, x = nn.Linear(300, 200, bias=False), torch.ones(50, 300)
    net.weight.grad = torch.zeros_like(net.weight)
    result = pf.peak_memory(lambda: net(x).sum().backward())
    grad, output = net.weight.nbytes, 50 * 200 * 4
    assert 0 <= result.peak - grad - output < 4096  # besides them, scalars only
    assert result.kept == 0


def test_the_same_number_each_time():
    model = pf.functionalize(nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8)))
    adapter = pf.bind(pf.lora(".*", rank=2), model)
    leaves = pf.map_leaves(lambda t: t.requires_grad_(), adapter.init(0)[1])

    def step() -> None:
        model(adapter.apply(adapter.frozen, leaves), torch.ones(4, 8)).sum().backward()

    step()
    assert len({pf.peak_memory(step) for _ in range(3)}) == 1


def test_an_exception_comes_through_and_no_profiler_is_left():
    def call() -> None:
        bytes_of(1000)
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        pf.peak_memory(call)
    assert not torch._C._autograd._profiler_enabled()
    assert pf.peak_memory(lambda: bytes_of(1000), device="cpu").peak == 1000


def test_it_is_not_inside_of_a_profiler_nor_of_itself_nor_on_other_devices():
    with torch.profiler.profile(), pytest.raises(pf.OptionError, match="running already"):
        pf.peak_memory(lambda: None, device="cpu")
    with pytest.raises(pf.OptionError, match="running already"):
        pf.peak_memory(lambda: pf.peak_memory(lambda: None, device="cpu"), device="cpu")
    with pytest.raises(pf.OptionError, match="meta is neither"):
        pf.peak_memory(lambda: None, device="meta")
    if not torch.cuda.is_available():
        with pytest.raises(pf.OptionError, match="cuda:1 is neither"):
            pf.peak_memory(lambda: None, device=1)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_cuda_up_to_the_rounding_of_its_allocator():
    def call() -> Tensor:
        first, second = (torch.empty(2**20, dtype=torch.uint8, device="cuda") for _ in range(2))
        del first
        third = torch.empty(2**19 + 1, dtype=torch.uint8, device="cuda")
        del second
        return third

    result = pf.peak_memory(call)
    assert result.device.type == "cuda"
    assert (result.peak, result.kept) == (2 * 2**20, 2**19 + 512)
