"""The levels of q3vl_mini (pyproject.toml, tool.importlinter) hold, and the check can fail."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LINT_IMPORTS = "import sys; from importlinter.cli import lint_imports_command as run; sys.exit(run(['--no-cache']))"


def lint_imports(folder: Path) -> subprocess.CompletedProcess:
    """Run import-linter on the package q3vl_mini that lies in `folder`, with `folder`'s pyproject.toml."""
    return subprocess.run([sys.executable, "-c", LINT_IMPORTS], cwd=folder, capture_output=True, text=True)


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A package with the real contract and two empty files: losses (level 0) and backbone (level 2)."""
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    (tmp_path / "q3vl_mini").mkdir()
    for name in ("__init__", "losses", "backbone"):
        (tmp_path / "q3vl_mini" / f"{name}.py").touch()
    return tmp_path


def test_the_package_imports_only_downwards():
    result = lint_imports(ROOT)
    assert result.returncode == 0, result.stdout + result.stderr


def test_an_import_of_a_lower_level_is_allowed(package):
    (package / "q3vl_mini" / "backbone.py").write_text("from q3vl_mini import losses\n")
    result = lint_imports(package)
    assert result.returncode == 0, result.stdout + result.stderr


def test_a_loss_that_imports_the_backbone_is_refused(package):
    (package / "q3vl_mini" / "losses.py").write_text("from q3vl_mini import backbone\n")
    result = lint_imports(package)
    assert result.returncode != 0
    assert "q3vl_mini.losses is not allowed to import q3vl_mini.backbone" in result.stdout


def test_an_import_within_a_level_is_refused(package):
    (package / "q3vl_mini" / "records.py").write_text("from q3vl_mini import losses\n")
    result = lint_imports(package)
    assert result.returncode != 0
    assert "q3vl_mini.records is not allowed to import q3vl_mini.losses" in result.stdout


def test_a_file_without_a_level_is_refused(package):
    (package / "q3vl_mini" / "misc.py").touch()
    result = lint_imports(package)
    assert result.returncode != 0
    assert "misc" in result.stdout
