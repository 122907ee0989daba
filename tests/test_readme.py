"""The README's example runs as it stands, and its commands are those that CI runs."""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_the_example_runs_and_learns(capsys):
    example, *more = blocks("python")
    names: dict[str, object] = {}
    exec(example, names)
    printed = capsys.readouterr().out
    assert "lora.0.weight.A" in printed
    assert "% of the 420 values of the model train" in printed
    start = names["adapter"].init(0)[1]
    assert names["loss"](names["best"]) < names["loss"](start)
    assert len([line for line in example.splitlines() if line.strip()]) <= 20
    for block in more:
        exec(block, names)
    assert names["logits"].shape == (8, 16, 4)
    assert names["mixed"].shape == (16, 4)


def test_ci_runs_the_readme_commands():
    ci = (ROOT / ".ci" / "run").read_text()
    assert "python -m pytest -n 2" in README
    assert "python -m pytest -n 2" in ci
    assert "-c constraints.txt -e '.[" in ci
    assert "peft-func demo" in ci


def test_local_links_exist():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("http") or (ROOT / target).exists(), target
