"""Fetch one package of a pinned version from npm, PyPI or Debian, and check that it is the one that was meant."""

import hashlib
import json
import subprocess
import tarfile
import zipfile
from pathlib import Path

COMMANDS = {
    "npm": ["npm", "pack", "--silent", "{name}@{version}"],
    "pypi": ["pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:", "{name}=={version}"],
    "debian": ["apt-get", "download", "{name}={version}"],
}


def state_source(folder: Path, source: str, name: str, version: str, address: str, licence: str) -> None:
    """Write source.json beside the data: the package, where it comes from, and its licence."""
    facts = {"package": f"{source}: {name} {version}", "address": address, "licence": licence}
    (folder / "source.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


def fetch(source: str, name: str, version: str, sha256: str, folder: Path, file: Path | None = None) -> Path:
    """Download a package into `folder`, or take `file`, unpack it there, and return the folder of its contents.

    Raises SystemExit if its hash is not `sha256`, or it cannot be downloaded.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if file is None:
        download = folder / "download"
        download.mkdir(exist_ok=True)
        command = [part.format(name=name, version=version) for part in COMMANDS[source]]
        done = subprocess.run(command, cwd=download, capture_output=True, text=True)
        found = sorted(path for path in download.iterdir() if path.is_file())
        if done.returncode != 0 or len(found) != 1:
            raise SystemExit(f"{' '.join(command)} failed: {done.stderr.strip()}; or give the file by --file")
        file = found[0]
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    if digest != sha256:
        raise SystemExit(f"{file} has the SHA-256 {digest}, and {name} {version} has {sha256}")
    target = folder / "contents"
    if source == "npm":
        with tarfile.open(file) as archive:
            archive.extractall(target, filter="data")
        return target / "package"
    if source == "pypi":
        with zipfile.ZipFile(file) as archive:
            archive.extractall(target)
    else:
        subprocess.run(["dpkg-deb", "--extract", file, target], check=True)
    return target
