"""The files around the package agree with each other and with what is in the repository."""

import argparse
import importlib.util
import json
import lzma
import os
import re
import socket
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

from q3vl_mini import cli

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT / "data_samples"
DOCS = sorted(path.relative_to(ROOT) for path in (ROOT / "docs").glob("*.md"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
CONDA = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))

# ---------------------------------------------------------------- requirements.txt, pyproject.toml, environment.yml


def pins(text: str) -> dict[str, str]:
    """{canonical name: version} of a requirements file; ValueError for a line that is not `name==version`.

    A pin may be for all systems but Windows.
    """
    found = {}
    for line in text.splitlines():
        line = line.partition("#")[0].strip()
        if not line:
            continue
        match = re.fullmatch(r"([A-Za-z0-9][A-Za-z0-9._-]*)==([0-9][A-Za-z0-9.]*)(; sys_platform != \"win32\")?", line)
        if match is None:
            raise ValueError(f"requirements.txt: {line!r} is not an exact pin; write name==version")
        found[canonicalize_name(match[1])] = match[2]
    return found


def ranges(project: dict) -> dict[str, Requirement]:
    """{canonical name: requirement} of everything pyproject.toml names: build system, runtime and extras."""
    lines = project["build-system"]["requires"] + project["project"]["dependencies"]
    lines += [line for extra in project["project"]["optional-dependencies"].values() for line in extra]
    requirements = [Requirement(line) for line in lines]
    own = canonicalize_name(project["project"]["name"])
    return {canonicalize_name(r.name): r for r in requirements if canonicalize_name(r.name) != own}


def disagreements(pinned: dict[str, str], wanted: dict[str, Requirement]) -> list[str]:
    """What is in one file and not in the other, and pins outside their range."""
    problems = [f"{name} is in pyproject.toml and not pinned in requirements.txt" for name in wanted.keys() - pinned]
    problems += [f"{name} is pinned in requirements.txt and not in pyproject.toml" for name in pinned.keys() - wanted]
    for name in pinned.keys() & wanted:
        if not wanted[name].specifier.contains(pinned[name]):
            problems.append(f"{name}=={pinned[name]} is outside pyproject.toml's {wanted[name].specifier}")
    return sorted(problems)


PINS = pins((ROOT / "requirements.txt").read_text(encoding="utf-8"))


@pytest.mark.parametrize("line", ["numpy", "numpy>=2", "numpy==2.*", "numpy==2.4.6,<3", "-e .", "git+https://x.org/y"])
def test_a_line_that_is_not_an_exact_pin_is_refused(line):
    with pytest.raises(ValueError, match="not an exact pin"):
        pins(line)


def test_pins_and_ranges_agree():
    assert disagreements(PINS, ranges(PROJECT)) == []


@pytest.mark.parametrize(
    "pinned, problem",
    [
        ({}, "not pinned"),
        ({"numpy": "1.26.4"}, "outside"),
        ({"numpy": "2.4.6", "scipy": "1.17.1"}, "not in pyproject"),
    ],
)
def test_a_disagreement_is_found(pinned, problem):
    (found,) = disagreements(pinned, {"numpy": Requirement("numpy>=2.0,<3")})
    assert problem in found


def test_every_range_has_a_lower_and_an_upper_bound():
    for requirement in ranges(PROJECT).values():
        operators = {s.operator for s in requirement.specifier}
        assert operators == {">=", "<"}, f"{requirement}: write >=lower,<upper"


def test_the_ranges_leave_an_installed_torch_alone():
    wanted = ranges(PROJECT)
    for torch, torchvision in [("2.6.0+cu124", "0.21.0+cu124"), ("2.9.0+cpu", "0.24.0+cpu"), ("2.12.0", "0.27.0")]:
        assert wanted["torch"].specifier.contains(torch)
        assert wanted["torchvision"].specifier.contains(torchvision)


def test_the_extra_all_has_every_other_extra():
    extras = PROJECT["project"]["optional-dependencies"]
    (everything,) = (Requirement(line) for line in extras["all"])
    assert everything.extras == extras.keys() - {"all"}


def test_what_the_colab_cell_installs_opens_the_demo():
    """Notebook 16 starts the demo, and a Colab has of the extras only what the set-up cell asks for."""
    extras = PROJECT["project"]["optional-dependencies"]
    (demo,) = (r for r in map(Requirement, extras["notebooks"]) if r.name == PROJECT["project"]["name"])
    assert demo.extras == {"demo"}
    setup = (ROOT / "notebooks" / "16_demo.ipynb").read_text(encoding="utf-8")
    assert f"{PROJECT['project']['name']}[notebooks] @ git+https://" in setup


def test_conda_installs_the_same_pins():
    (pip_section,) = (d["pip"] for d in CONDA["dependencies"] if isinstance(d, dict))
    assert pip_section == ["-r requirements.txt", "-e ."]
    others = [d for d in CONDA["dependencies"] if isinstance(d, str)]
    assert [d.partition("=")[0] for d in others] == ["python", "pip"], "packages come from requirements.txt alone"


def test_conda_and_the_workflow_use_supported_pythons():
    supported = SpecifierSet(PROJECT["project"]["requires-python"])
    (conda_python,) = (d.split("=")[1] for d in CONDA["dependencies"] if str(d).startswith("python="))
    workflow = yaml.safe_load((ROOT / ".github/workflows/test.yml").read_text(encoding="utf-8"))
    tried = workflow["jobs"]["test"]["strategy"]["matrix"]["python"]
    assert all(supported.contains(f"{version}.0") for version in [conda_python, *tried])
    assert {conda_python, "3.13"} <= set(tried)
    assert not supported.contains("3.10.0")


# ---------------------------------------------------------------- what the prose points to


def repository_files() -> list[Path]:
    """Files that git has, or would take with `git add .`."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listing = subprocess.run(command, cwd=ROOT, capture_output=True)
    if listing.returncode != 0:
        pytest.skip("not a git checkout: the files of the repository cannot be told from others")
    paths = [ROOT / name for name in listing.stdout.decode().split("\0") if name]
    return [path for path in paths if path.is_file()]


def makefile_targets() -> set[str]:
    return set(re.findall(r"^([a-z][a-z-]*):(?!=)", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.M))


def test_make_targets_that_the_readme_names_exist():
    named = set(re.findall(r"(?:^|`)make ([a-z][a-z-]*)", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.M))
    assert {"run", "test", "env"} <= named
    assert named <= makefile_targets()


def test_the_makefile_has_the_promised_targets_and_explains_each():
    promised = "env run pretrain artifacts test test-fast lint clean".split()
    explained = re.findall(r"^([a-z][a-z-]*):.*## \w", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.M)
    assert set(promised) <= set(explained)
    assert set(explained) == makefile_targets()


def test_every_command_line_that_is_named_is_one():
    named = {
        command
        for page in ("Makefile", "README.md", *DOCS, ".github/workflows/test.yml")
        for command in re.findall(r"q3vl-mini ([a-z]+(?:-[a-z]+)*)", (ROOT / page).read_text(encoding="utf-8"))
    }
    [commands] = [action for action in cli.parser()._actions if isinstance(action, argparse._SubParsersAction)]
    assert {"run", "pretrain"} <= named <= set(commands.choices)


@pytest.mark.parametrize("file", sorted((ROOT / "configs" / "accelerate").glob("*.yaml")), ids=lambda file: file.stem)
def test_accelerate_reads_the_launch_files(file):
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(file))
    assert config.num_processes >= 2 and config.mixed_precision == "no"


def test_two_cpus_are_two_processes(tmp_path):
    """Accelerate starts one where it takes a launch for another kind, and says nothing."""
    (tmp_path / "say.py").write_text(
        "import pathlib\nfrom accelerate import Accelerator\na = Accelerator(cpu=True)\n"
        "pathlib.Path(__file__).with_name(f'{a.process_index} of {a.num_processes}').touch()\n"
    )
    file = ROOT / "configs" / "accelerate" / "two_cpus.yaml"
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(file)]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        command += ["--main_process_port", str(free.getsockname()[1]), str(tmp_path / "say.py")]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    said = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment)
    assert sorted(file.name for file in tmp_path.glob("* of *")) == ["0 of 2", "1 of 2"], said.stderr


def anchors(markdown: str) -> set[str]:
    """GitHub's anchors of the headings."""
    titles = re.findall(r"^#+ +(.+?) *$", re.sub(r"^```.*?^```", "", markdown, flags=re.M | re.S), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def broken_links(page: Path) -> list[str]:
    """Links of a Markdown page to files or headings that are not there."""
    text = page.read_text(encoding="utf-8")
    broken = []
    for link in re.findall(r"\]\(<?([^)\s>]+)>?\)", text):
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        if not target.exists() or (
            anchor and target.suffix == ".md" and anchor not in anchors(target.read_text(encoding="utf-8"))
        ):
            broken.append(f"{page.name}: {link}")
    return broken


def test_links_between_pages_resolve():
    pages = [path for path in repository_files() if path.suffix == ".md"]
    assert ROOT / "README.md" in pages and DATA / "README.md" in pages
    assert [link for page in pages for link in broken_links(page)] == []


def test_a_broken_link_is_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# A title\n[ok](page.md#a-title) [ok](https://example.org) [no](absent.md) [no](#other)\n")
    assert broken_links(page) == ["page.md: absent.md", "page.md: #other"]


def test_the_readme_has_a_place_for_the_stage_table():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert re.search(r"^## Results$.*^<!-- stage-table:begin -->$.*^<!-- stage-table:end -->$", text, re.M | re.S)


# ---------------------------------------------------------------- nothing of a developer's machine

MACHINE_PATH = re.compile(
    r"(?<![\w.$~}-])(?:/(?:home|Users)/\w[\w.-]*/|/(?:root|work|tmp/w)/[\w.-]+|/opt/(?:wheels|pypi)\b|[A-Z]:\\+Users\\)"
)


def test_no_file_names_a_path_of_a_developers_machine():
    found = []
    for path in repository_files():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:  # binary
            continue
        found += [f"{path.relative_to(ROOT)}: {match[0]}" for match in MACHINE_PATH.finditer(text)]
    assert found == []


@pytest.mark.parametrize("parts", [("", "home", "ada", "x"), ("", "Users", "ada", "x"), ("", "root", "x")])
def test_a_path_of_a_developers_machine_is_recognised(parts):
    assert MACHINE_PATH.search(f"reads {'/'.join(parts)}")
    assert not MACHINE_PATH.search(f"see https://example.org{'/'.join(parts)} and data{'/'.join(parts)}")


# ---------------------------------------------------------------- data_samples


def size_mb(folder: Path) -> float:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e6


def test_data_samples_stay_small():
    assert 1 < size_mb(DATA / "emoji_world") <= 12
    assert size_mb(DATA) <= 40


def test_the_index_names_everything_in_data_samples():
    index = (DATA / "README.md").read_text(encoding="utf-8")
    sources = [path for path in (DATA / "emoji_world").rglob("*") if path.is_file()]
    licences = list((DATA / "licences").iterdir())
    folders = list(DATA.iterdir())
    assert len(sources) >= 8 and len(licences) >= 4
    for path in sources + licences + folders:
        assert f"`{path.name}`" in index or f"/{path.name})" in index or path == DATA / "README.md", path.name


def test_the_index_states_the_versions_and_counts_that_are_there():
    spec = importlib.util.spec_from_file_location("build_sources", ROOT / "scripts" / "build_sources.py")
    build_sources = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(build_sources)
    index = (DATA / "README.md").read_text(encoding="utf-8")
    for package, version in [*build_sources.STYLES.values(), build_sources.CLDR, build_sources.EMOJIBASE]:
        assert f"`{package}` {version} |" in index
    for style in build_sources.STYLES:
        pictures = json.loads(lzma.decompress((DATA / "emoji_world/sprites" / f"{style}.json.xz").read_bytes()))
        (row,) = re.findall(rf"^\| `{style}\.json\.xz` \|.*$", index, flags=re.M)
        assert f"| {len(pictures)} |" in row
        assert ("training style" if style in build_sources.TRAIN_STYLES else "never trained on") in row
    concepts = json.loads((DATA / "emoji_world/concepts.json").read_text(encoding="utf-8"))
    assert f"the {len(concepts)} concepts in {len(build_sources.LANGUAGES)} languages" in " ".join(index.split())


# ---------------------------------------------------------------- an installed wheel


@pytest.mark.slow
def test_a_wheel_carries_presets_data_and_licences(tmp_path):
    pytest.importorskip("hatchling", reason="hatchling, pinned in requirements.txt, is not installed here")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        metadata = archive.read(next(n for n in names if n.endswith(".dist-info/METADATA"))).decode()
    tracked = {path.relative_to(ROOT).as_posix() for path in repository_files()}
    expected = {n for n in tracked if n.startswith("q3vl_mini/")}
    expected |= {f"q3vl_mini/{n}" for n in tracked if n.startswith("data_samples/")}
    assert "q3vl_mini/data_samples/emoji_world/concepts.json" in expected
    assert expected <= names
    assert any(n.endswith("licenses/LICENSE") for n in names)
    assert Version(re.search(r"^Version: (.+)$", metadata, re.M)[1]) >= Version("0.1")


# ---------------------------------------------------------------- the guard in conftest.py


def test_a_test_cannot_reach_the_network():
    with pytest.raises(RuntimeError, match="Tests run without a network"):
        socket.create_connection(("example.org", 443), timeout=1)
    with pytest.raises(RuntimeError, match="192.0.2.1:80"), socket.socket() as sock:
        sock.connect(("192.0.2.1", 80))


def test_a_test_can_reach_a_server_on_this_machine():
    with socket.create_server(("127.0.0.1", 0)) as server:
        with socket.create_connection(("localhost", server.getsockname()[1]), timeout=5) as client:
            assert client.getpeername() == server.getsockname()
