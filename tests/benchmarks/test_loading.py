"""The benchmark of loading runs, and its loaders load the same."""

from benchmarks import loading


def test_every_loader_is_timed():
    times = loading.seconds(3, 2, layers=1, hidden=16)
    ours = {loading.ONE, loading.BOUND, loading.MANY}
    assert {name: len(rounds) for name, rounds in times.items()} == dict.fromkeys(
        ours | {loading.PEFT, loading.LEAN}, 2
    )
    assert loading.ratios(times).keys() == loading.ratios(times, loading.LEAN).keys() == ours
