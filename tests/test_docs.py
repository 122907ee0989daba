"""Every Python block of the docs runs, page by page, and every notebook runs from a clean kernel."""

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parent.parent
PAGES = [page for page in sorted((ROOT / "docs").glob("*.md")) if "```python" in page.read_text()]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


# Lightning's own, with any module:
@pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no:UserWarning")
@pytest.mark.filterwarnings("ignore:.*treespec, LeafSpec.*:FutureWarning")
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_blocks_of_a_page_run_in_order(page):
    names: dict[str, object] = {}
    for block in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL):
        exec(block, names)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_and_was_committed_with_its_outputs(path):
    notebook = nbformat.read(path, as_version=4)
    assert all(cell.outputs or cell.execution_count for cell in notebook.cells if cell.cell_type == "code")
    NotebookClient(notebook, timeout=300, kernel_name="python3").execute(cwd=str(path.parent))
