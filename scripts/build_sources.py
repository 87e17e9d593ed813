"""Rebuild data_samples/emoji_world from pinned npm packages, byte for byte.

    python scripts/build_sources.py            # download (npm pack), build, compare with SHA256SUMS
    python scripts/build_sources.py --write    # the same, then rewrite the files and SHA256SUMS

Five Iconify JSON packages give the SVG bodies of the five drawing styles, emojibase-data gives
groups and order, cldr-annotations-full gives names and keywords in many languages. Only concepts
that exist in all three training styles are kept. Sources and licences: data_samples/README.md.
"""

import argparse
import hashlib
import json
import lzma
import re
import subprocess
import tarfile
import tempfile
from pathlib import Path

OUT = Path(__file__).resolve().parents[1] / "data_samples" / "emoji_world"
STYLES = {  # style -> (npm package, version)
    "noto": ("@iconify-json/noto", "1.2.9"),
    "twemoji": ("@iconify-json/twemoji", "1.2.5"),
    "fluent-emoji-flat": ("@iconify-json/fluent-emoji-flat", "1.2.6"),
    "noto-v1": ("@iconify-json/noto-v1", "1.2.5"),
    "emojione": ("@iconify-json/emojione", "1.2.3"),
}
TRAIN_STYLES = ("noto", "twemoji", "fluent-emoji-flat")
CLDR = ("cldr-annotations-full", "48.2.0")
EMOJIBASE = ("emojibase-data", "17.0.0")
LANGUAGES = (
    "am ar bg bn cs da de el en es et fa fi fr gu he hi hr hu hy id it ja ka km ko lt lv ml mr ms my "
    "nl no pa pl pt ro ru si sk sl sr sv sw ta te th tr uk ur vi zh zh-Hant"
).split()
COMPONENT_GROUP = 2  # emojibase: skin tones and hair, not concepts of their own


def download(package: str, version: str, folder: Path) -> Path:
    """Fetch one npm package into `folder` and unpack it; returns the unpacked package folder."""
    name = subprocess.run(
        ["npm", "pack", "--silent", f"{package}@{version}"], cwd=folder, check=True, capture_output=True, text=True
    ).stdout.strip().splitlines()[-1]
    target = folder / name.removesuffix(".tgz")
    with tarfile.open(folder / name) as tar:
        tar.extractall(target, filter="data")
    return target / "package"


def load_json(path: Path):
    return json.loads(path.read_text(encoding="utf-8"))


def hexcode_key(code: str) -> str:
    """Hex code points without the variation selector, lower case: '2764-FE0F' -> '2764'."""
    return "-".join(p for p in code.lower().split("-") if p != "fe0f")


def resolve(icons: dict, name: str) -> dict | None:
    """An icon of an Iconify set by name, following aliases; None where absent or transformed."""
    seen = {}
    while name not in icons["icons"]:
        alias = icons.get("aliases", {}).get(name)
        if alias is None or name in seen:
            return None
        seen[name] = alias
        if set(alias) - {"parent"}:  # a flipped or rotated alias is another picture
            return None
        name = alias["parent"]
    icon = icons["icons"][name]
    return {
        "body": icon["body"],
        "box": [icon.get(k, icons.get(k, d)) for k, d in (("left", 0), ("top", 0), ("width", 16), ("height", 16))],
    }


def build(folder: Path) -> dict[str, bytes]:
    """All output files as {relative name: bytes}."""
    packages = {s: download(*STYLES[s], folder) for s in STYLES}
    icons = {s: load_json(p / "icons.json") for s, p in packages.items()}
    chars = {
        s: {hexcode_key(h): n for h, n in load_json(packages[s] / "chars.json").items()} for s in TRAIN_STYLES
    }
    base = download(*EMOJIBASE, folder)
    cldr = download(*CLDR, folder)
    meta = load_json(base / "meta" / "groups.json")
    subgroup_key = {int(k): v for k, v in meta["subgroups"].items()}
    group_key = {int(k): v for k, v in meta["groups"].items()}

    sprites: dict[str, dict] = {s: {} for s in STYLES}
    concepts = []
    for e in sorted(load_json(base / "en" / "data.json"), key=lambda e: e.get("order", 0)):
        key = hexcode_key(e["hexcode"])
        if e.get("group", COMPONENT_GROUP) == COMPONENT_GROUP:
            continue
        names = [chars[s].get(key) for s in TRAIN_STYLES]
        if not all(names):
            continue
        for s in STYLES:  # the test sets publish no code points: match by the training sets' names
            own = [chars[s][key]] if s in chars else list(dict.fromkeys(names))
            icon = next((i for n in own if (i := resolve(icons[s], n))), None)
            if icon:
                sprites[s][key] = icon
        concepts.append(
            {
                "key": key,
                "emoji": e["emoji"],
                "name": e["label"],
                "group": group_key[e["group"]],
                "subgroup": subgroup_key[e["subgroup"]],
            }
        )
    concepts = [c for c in concepts if all(c["key"] in sprites[s] for s in TRAIN_STYLES)]

    annotations = {}
    for lang in LANGUAGES:
        table = load_json(cldr / "annotations" / lang / "annotations.json")["annotations"]["annotations"]
        by_key = {hexcode_key("-".join(f"{ord(c):x}" for c in char)): v for char, v in table.items()}
        annotations[lang] = {
            c["key"]: {"name": row["tts"][0], "keywords": row.get("default", [])}
            for c in concepts
            if (row := by_key.get(c["key"])) and row.get("tts")
        }

    def packed(value) -> bytes:
        text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), sort_keys=True)
        return lzma.compress(text.encode("utf-8"), preset=9 | lzma.PRESET_EXTREME)

    files = {f"sprites/{s}.json.xz": packed(sprites[s]) for s in STYLES}
    files["annotations.json.xz"] = packed(annotations)
    files["concepts.json"] = (
        "[\n" + ",\n".join(json.dumps(c, ensure_ascii=False, sort_keys=True) for c in concepts) + "\n]\n"
    ).encode("utf-8")
    return files


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="write the files and SHA256SUMS instead of only comparing")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as tmp:
        files = build(Path(tmp))
    sums = {name: hashlib.sha256(data).hexdigest() for name, data in sorted(files.items())}
    listing = "".join(f"{digest}  {name}\n" for name, digest in sums.items())
    if args.write:
        for name, data in files.items():
            (OUT / name).parent.mkdir(parents=True, exist_ok=True)
            (OUT / name).write_bytes(data)
        (OUT / "SHA256SUMS").write_text(listing)
    recorded = dict(re.findall(r"^(\w+)  (.+)$", (OUT / "SHA256SUMS").read_text(), flags=re.M))
    recorded = {name: digest for digest, name in recorded.items()}
    wrong = [n for n in sums if recorded.get(n) != sums[n] or (OUT / n).read_bytes() != files[n]]
    print(listing + (f"DIFFERENT: {wrong}" if wrong else "all files identical to the committed ones"))
    raise SystemExit(bool(wrong))


if __name__ == "__main__":
    main()
