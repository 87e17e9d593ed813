"""Synthesis against annotators that answer well, badly and not at all, and against a seed pool with faults."""

import base64
import io
import json
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import jsonschema
import numpy as np
import pytest
from PIL import Image

from q3vl_mini import journal, synthesis
from q3vl_mini.annotation import CAPTIONS, TASKS, checked, messages
from q3vl_mini.data import load_quadruple, png_bytes, video_bytes
from q3vl_mini.emoji_world import words
from q3vl_mini.emoji_world.annotator import EmojiAnnotator
from q3vl_mini.emoji_world.scenes import Film, Placed, Scene, Track
from q3vl_mini.emoji_world.tasks import build
from q3vl_mini.endpoint import NoAnswer, OpenAIAnnotator, encoded
from q3vl_mini.journal import Asset, Journal
from q3vl_mini.media import MediaBudget
from q3vl_mini.quality import Quality, changes_between, check_image, check_video, sampled
from q3vl_mini.records import Clip, Rejected, validate
from q3vl_mini.synthesis import assets_in, balance, synthesize

ANY_SIZE = Quality(min_side=16)
RNG = np.random.default_rng(0)


def picture(colour) -> Image.Image:
    return Image.new("RGB", (64, 48), colour)


def pictures(n) -> list[Asset]:
    """n pictures, each of a colour of its own: red is its number."""
    return [Asset(f"{i}.png", "image", png_bytes(picture((8 * i, 100, 200)))) for i in range(n)]


def good_answer(task_name: str) -> dict:
    """An answer that follows every rule of a task."""
    task = CAPTIONS["image"] if task_name == "caption" else TASKS[task_name]
    answer = {name: f"some {name.replace('_', ' ')}" for name in task.fields}
    moments = {"start": 1.0, "end": 3.0, "other_start": 6.0, "other_end": 8.0}
    kind = {"task_type": next(iter(task.types))} if task.types else {}
    return answer | kind | {name: moments[name] for name in task.numbers}


# ---------------------------------------------------------------- a server that can misbehave


class Server:
    """A chat endpoint on this machine. `script(asset, task, times)` gives (status, text), or None for no answer.

    asset is the red of the first picture over 8 (see `pictures`), times how often it was asked for this task before.
    """

    def __init__(self, script):
        self.script, self.asked, self.bodies, self.headers, self.annotators = script, Counter(), [], [], []
        self.lock, self.running, self.most = threading.Lock(), 0, 0
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                task, asset = body["response_format"]["json_schema"]["name"], red_of(body)
                with server.lock:
                    times = server.asked[asset, task]
                    server.asked[asset, task] += 1
                    server.running += 1
                    server.most = max(server.most, server.running)
                    server.bodies.append(body)
                    server.headers.append(dict(self.headers))
                try:
                    answer = server.script(asset, task, times)
                    if answer is None:
                        time.sleep(1.0)  # longer than any client here waits
                        answer = 200, ""
                finally:
                    with server.lock:
                        server.running -= 1
                status, text = answer
                content = json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]}).encode()
                try:
                    self.send_response(status)
                    self.send_header("Content-Length", str(len(content)))
                    self.end_headers()
                    self.wfile.write(content)
                except (BrokenPipeError, ConnectionResetError):
                    pass  # the client has gone

            def log_message(self, *args):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}/v1"
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def annotator(self, **options) -> OpenAIAnnotator:
        annotator = OpenAIAnnotator(self.url, "qwen", **{"wait": 0.01, "timeout": 5.0, "tries": 3} | options)
        self.annotators.append(annotator)
        return annotator


def red_of(body) -> int:
    [_, user, *_] = body["messages"]
    url = next(part["image_url"]["url"] for part in user["content"] if part["type"] == "image_url")
    image = Image.open(io.BytesIO(base64.b64decode(url.removeprefix("data:image/jpeg;base64,"))))
    return round(np.asarray(image)[..., 0].mean() / 8)


@pytest.fixture
def serve():
    """Starts servers, and stops them after the test."""
    servers = []

    def start(script):
        servers.append(Server(script))
        return servers[-1]

    yield start
    for server in servers:
        for annotator in server.annotators:
            annotator.close()
        server.http.shutdown()
        server.http.server_close()


def well(asset, task, times):
    return 200, json.dumps(good_answer(task))


def run(assets, tasks, annotator, folder, **options):
    defaults = {"quality": ANY_SIZE, "workers": 4, "progress": False}
    return synthesize(assets, tasks, annotator, folder, **defaults | options)


def rejects_of(folder) -> dict[str, list[str]]:
    """Reason to assets, of the file of rejects."""
    found: dict[str, list[str]] = {}
    for line in (folder / "rejects.jsonl").read_text().splitlines():
        found.setdefault(json.loads(line)["reason"], []).append(json.loads(line)["asset"])
    return {reason: sorted(assets) for reason, assets in found.items()}


# ---------------------------------------------------------------- an endpoint that answers well


def test_a_server_that_answers_well_gives_a_quadruple(serve, tmp_path):
    def script(asset, task, times):
        changes = {} if task == "caption" else {"question": f"question {asset}?", "positive_answer": f"right {asset}"}
        return 200, json.dumps(good_answer(task) | changes)

    server, assets = serve(script), pictures(10)
    made = run(assets, ["image_qa"], server.annotator(api_key="k-1"), tmp_path, licence="CC0-1.0")
    assert set(server.asked.values()) == {1} and len(server.asked) == 2 * 10  # a caption and a question each
    saved = load_quadruple(tmp_path / "image_qa", streaming=True)
    validate(saved)
    assert saved.meta["licence"] == "CC0-1.0" and saved.task == "image_qa"
    for quadruple in (made["image_qa"], saved):
        assert len(quadruple) == 10
        for i, (query, labels) in enumerate(zip(quadruple.queries, quadruple.relevance, strict=True)):
            assert query["text"] == f"question {i}?"
            [right], [wrong] = labels.positives, labels.negatives
            assert quadruple.corpus[right]["text"] == f"right {i}"
            assert quadruple.corpus[wrong]["text"] == "some hard negative answer"
    assert np.asarray(saved.queries[3]["image"])[0, 0].tolist() == [24, 100, 200]


def test_the_request_is_what_an_openai_compatible_endpoint_takes(serve, tmp_path):
    server = serve(well)
    run(pictures(1), ["image_cls"], server.annotator(api_key="k-1", temperature=0.3), tmp_path)
    caption, labels = server.bodies
    assert server.headers[0]["Authorization"] == "Bearer k-1"
    assert labels["model"] == "qwen" and labels["temperature"] == 0.3 and labels["max_tokens"] > 100
    schema = {"name": "image_cls", "strict": True, "schema": TASKS["image_cls"].schema}
    assert labels["response_format"] == {"type": "json_schema", "json_schema": schema}
    system, user = labels["messages"]
    assert system["role"] == "system" and "JSON" in system["content"]
    assert [part["type"] for part in user["content"]] == ["image_url", "text"]
    assert "some caption" in user["content"][1]["text"] and "500 words" in user["content"][1]["text"]  # captioned first
    assert caption["messages"][1]["content"][1]["text"].startswith("Write `caption`")


def test_requests_are_at_work_together_but_never_more_than_workers(serve, tmp_path):
    def script(asset, task, times):
        time.sleep(0.05)
        return well(asset, task, times)

    server = serve(script)
    run(pictures(12), ["image_ret"], server.annotator(), tmp_path, workers=3)
    assert server.most == 3


def test_a_video_is_sent_as_pictures_after_their_times():
    clip = Clip(np.stack([np.full((32, 32, 3), 20 * i, np.uint8) for i in range(8)]), 2.0)
    budget = MediaBudget(fps=2.0, max_frames=8, video_max_tokens=400)
    message = {"role": "user", "content": [{"type": "video", "video": clip}, {"type": "text", "text": "Well?"}]}
    parts = encoded(message, budget)["content"]
    said = [part["text"] for part in parts if part["type"] == "text"]
    assert said == [*(f"At {i + 0.25:.1f} seconds:" for i in range(4)), "Well?"]
    assert [part["type"] for part in parts] == ["text", "image_url"] * 4 + ["text"]
    reds = [red_of({"messages": [None, {"content": [part]}]}) for part in parts if part["type"] == "image_url"]
    assert reds == [0, 5, 10, 15]  # of every other frame, over 8


def test_a_large_picture_is_made_smaller_in_its_shape():
    message = {"role": "user", "content": [{"type": "image", "image": Image.new("RGB", (4000, 1000))}]}
    [part] = encoded(message, MediaBudget(image_max_tokens=100))["content"]
    data = part["image_url"]["url"].removeprefix("data:image/jpeg;base64,")
    width, height = Image.open(io.BytesIO(base64.b64decode(data))).size
    assert 0.95 * 100 * 1024 < width * height <= 100 * 1024 and width / height == pytest.approx(4, rel=0.01)


# ---------------------------------------------------------------- one that answers badly


def test_bad_answers_are_asked_again_with_the_fault_then_left_out_and_counted(serve, tmp_path):
    good = good_answer("image_qa")
    long = " ".join(["word"] * 501)
    bad = {
        0: "Sure! Here is your question.",
        1: json.dumps({k: v for k, v in good.items() if k != "question"}),
        2: json.dumps(good | {"task_type": "riddle"}),
        3: json.dumps(good | {"description": long}),
        4: json.dumps(good | {"hard_negative_answer": good["positive_answer"].upper() + " ."}),
        5: json.dumps(good | {"question": "  "}),
        6: json.dumps(good | {"question": "half a \ud83d?"}),
        7: "[" * 100_000,
    }

    def script(asset, task, times):
        return (200, bad[asset]) if task == "image_qa" and asset in bad else well(asset, task, times)

    server = serve(script)
    made = run(pictures(10), ["image_qa"], server.annotator(), tmp_path, tries=2)
    assert len(made["image_qa"]) == 2
    assert rejects_of(tmp_path) == {
        "not JSON": ["0.png", "6.png", "7.png"],
        "not of the schema": ["1.png", "2.png"],
        "too long": ["3.png"],
        "right and wrong are the same": ["4.png"],
        "empty field": ["5.png"],
    }
    assert made["image_qa"].meta["report"]["image_qa"] == {
        "passed": 2,
        "not JSON": 3,
        "not of the schema": 2,
        "too long": 1,
        "right and wrong are the same": 1,
        "empty field": 1,
    }
    assert all(server.asked[i, "image_qa"] == (2 if i in bad else 1) for i in range(10))
    second = next(b for b in server.bodies if len(b["messages"]) == 4 and red_of(b) == 3)
    assert second["messages"][2] == {"role": "assistant", "content": bad[3]}
    assert "description has 501 words, at most 500" in second["messages"][3]["content"]


def test_an_answer_that_is_mended_is_taken(serve, tmp_path):
    server = serve(lambda asset, task, times: (200, "nothing") if times == 0 else well(asset, task, times))
    made = run(pictures(3), ["image_ret"], server.annotator(), tmp_path)
    assert len(made["image_ret"]) == 3 and not (tmp_path / "rejects.jsonl").exists()
    assert set(server.asked.values()) == {2}


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_busy_or_broken_server_is_asked_again(serve, tmp_path, status):
    server = serve(lambda asset, task, times: (status, "") if times < 2 else well(asset, task, times))
    made = run(pictures(2), ["image_ret"], server.annotator(), tmp_path)
    assert len(made["image_ret"]) == 2 and set(server.asked.values()) == {3}


def test_waits_between_tries_double(serve, monkeypatch):
    server, waits = serve(lambda *_: (500, "")), []
    monkeypatch.setattr("q3vl_mini.endpoint.time.sleep", waits.append)
    with pytest.raises(NoAnswer, match="5 tries, the last one: HTTP 500"):
        server.annotator(tries=5, wait=1.0)(messages(CAPTIONS["image"], picture("red")), CAPTIONS["image"].schema)
    assert len(waits) == 4 and all(2**i <= seconds <= 1.5 * 2**i for i, seconds in enumerate(waits))


def test_a_request_that_the_endpoint_refuses_costs_one_asset(serve, tmp_path):
    server = serve(lambda asset, task, times: (400, "too large") if asset == 1 else well(asset, task, times))
    assert len(run(pictures(3), ["image_ret"], server.annotator(), tmp_path)["image_ret"]) == 2
    assert rejects_of(tmp_path) == {"refused by the endpoint": ["1.png"]} and server.asked[1, "caption"] == 1


def test_a_wrong_key_or_model_stops_at_once(serve, tmp_path):
    server = serve(lambda *_: (401, ""))
    with pytest.raises(ConnectionError, match="HTTP 401 .*check address, model and API key"):
        run(pictures(30), ["image_ret"], server.annotator(), tmp_path)
    assert sum(server.asked.values()) < 20 and not (tmp_path / "rejects.jsonl").exists()


def test_an_address_that_is_none_is_named():
    with pytest.raises(ValueError, match="'localhost:8000' is no address of an endpoint"):
        OpenAIAnnotator("localhost:8000", "qwen")


# ---------------------------------------------------------------- one that does not answer


def test_a_request_that_times_out_costs_one_asset_which_is_asked_in_the_next_run(serve, tmp_path):
    silent = {2}
    server = serve(lambda asset, task, times: None if asset in silent else well(asset, task, times))
    annotator = server.annotator(timeout=0.2, tries=2)
    assert len(run(pictures(4), ["image_ret"], annotator, tmp_path)["image_ret"]) == 3
    assert rejects_of(tmp_path) == {"no answer": ["2.png"]}
    silent.clear()
    before = dict(server.asked)
    assert len(run(pictures(4), ["image_ret"], annotator, tmp_path)["image_ret"]) == 4
    assert {key for key, n in server.asked.items() if n > before.get(key, 0)} == {(2, "caption"), (2, "image_ret")}


def test_a_dead_endpoint_stops_the_run_with_the_remedy(tmp_path, monkeypatch):
    monkeypatch.setattr(journal, "SILENT", 3)
    annotator = OpenAIAnnotator("http://127.0.0.1:9/v1", "qwen", wait=0.0, tries=1)  # nothing listens there
    with pytest.raises(ConnectionError, match=r"caption: 3 assets in a row got no answer .*it goes on from here"):
        run(pictures(30), ["image_ret"], annotator, tmp_path, workers=1)
    assert len((tmp_path / "rejects.jsonl").read_text().splitlines()) == 3


# ---------------------------------------------------------------- stopped and continued


def test_a_run_that_was_interrupted_goes_on_and_asks_nothing_twice(tmp_path):
    asked = Counter()
    stop = threading.Event()

    def annotator(chat, schema):
        asked[chat[1]["content"][0]["image"], schema["title"]] += 1
        if sum(asked.values()) > 15 and not stop.is_set():
            stop.set()
            raise KeyboardInterrupt
        return json.dumps(good_answer(schema["title"]))

    with pytest.raises(KeyboardInterrupt):
        run(pictures(20), ["image_ret"], annotator, tmp_path, workers=1)
    known = len((tmp_path / "answers.jsonl").read_text().splitlines())
    assert 20 + 15 <= known < 60  # of the quality filter, and of captions
    with open(tmp_path / "answers.jsonl", "a") as file:
        file.write('{"step": "caption", "asset": "19.png", "answ')  # as a kill in the middle of a write leaves it
    made = run(pictures(20), ["image_ret"], annotator, tmp_path, workers=1)
    assert len(made["image_ret"]) == 20
    assert sorted(asked.values()) == [1] * 39 + [2]  # only the one in whose middle it was interrupted
    assert [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    again = dict(asked)
    run(pictures(20), ["image_ret"], annotator, tmp_path)
    assert dict(asked) == again


@pytest.mark.skipif(sys.platform == "win32", reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_killed_process_loses_at_most_what_was_being_answered(serve, tmp_path):
    def script(asset, task, times):
        time.sleep(0.02)
        return well(asset, task, times)

    server, workers = serve(script), 2
    child = multiprocessing.get_context("fork").Process(
        target=run, args=(pictures(20), ["image_ret"], server.annotator(), tmp_path), kwargs={"workers": workers}
    )
    child.start()
    file = tmp_path / "answers.jsonl"
    deadline = time.monotonic() + 30
    while not (file.is_file() and file.read_text().count('"caption"') >= 6) and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(child.pid, signal.SIGKILL)
    child.join()
    assert child.exitcode == -signal.SIGKILL and not (tmp_path / "image_ret").exists()
    time.sleep(0.1)  # requests of the dead child end
    made = run(pictures(20), ["image_ret"], server.annotator(), tmp_path)
    assert len(made["image_ret"]) == 20
    assert sum(server.asked.values()) <= 40 + 2 * workers and max(server.asked.values()) <= 2


def test_a_folder_of_other_tasks_is_refused(tmp_path):
    def annotator(chat, schema):
        return json.dumps(good_answer(schema["title"]))

    run(pictures(2), ["image_ret"], annotator, tmp_path)
    with pytest.raises(ValueError, match="answers with another tasks; give another folder"):
        run(pictures(2), ["image_qa"], annotator, tmp_path)


# ---------------------------------------------------------------- the filters


def moving(n=16, fps=4.0, size=64) -> np.ndarray:
    """A square that walks over a noisy ground, (n, size, size, 3)."""
    ground = np.random.default_rng(1).integers(60, 120, (size, size, 3), dtype=np.uint8)
    frames = np.repeat(ground[None], n, axis=0)
    for i in range(n):
        frames[i, 20:40, 2 * i : 2 * i + 20] = 250
    return frames


def test_pictures_are_kept_by_size_and_shape(tmp_path):
    quality = Quality(min_side=100, max_aspect=3)
    assert check_image(Image.new("RGB", (100, 300)), quality) == {"width": 100, "height": 300}
    (tmp_path / "broken.jpg").write_bytes(b"no picture")
    for value, reason in (
        (Image.new("RGB", (1, 1000)), "too long and thin"),
        (Image.new("RGB", (100, 301)), "too long and thin"),
        (Image.new("RGB", (99, 120)), "too small"),
        (str(tmp_path / "broken.jpg"), "unreadable"),
    ):
        with pytest.raises(Rejected) as found:
            check_image(value, quality)
        assert found.value.reason == reason


@pytest.mark.parametrize("stored", [False, True])
def test_clips_are_kept_by_cuts_and_motion(stored):
    """As frames in memory and as a file."""
    one, other = moving(), 255 - moving()
    still = np.repeat(one[:1], 16, axis=0)
    values = {"moving": one, "cut": np.concatenate([one, other]), "still": still, "short": one[:6], "small": one[:, :8]}
    clips = {name: Clip(frames, 4.0) for name, frames in values.items()}
    if stored:
        clips = {name: video_bytes(clip) for name, clip in clips.items()}
    found = check_video(clips["moving"], ANY_SIZE)
    assert (found["width"], found["height"], found["cuts"]) == (64, 64, 0) and found["seconds"] == pytest.approx(4)
    assert found["still"] < 0.1
    for name, reason in (("cut", "several scenes"), ("still", "nothing moves"), ("short", "too short")):
        with pytest.raises(Rejected) as rejected:
            check_video(clips[name], ANY_SIZE)
        assert rejected.value.reason == reason
    with pytest.raises(Rejected, match="too long and thin"):
        check_video(clips["small"], ANY_SIZE)
    assert check_video(clips["cut"], ANY_SIZE, one_scene=False)["cuts"] == 1  # a film of which moments are sought
    with pytest.raises(Rejected, match="unreadable"):
        check_video(b"no video", ANY_SIZE)


def test_changes_equal_a_loop_over_the_pixels():
    frames = RNG.integers(0, 256, (3, 5, 4, 3), dtype=np.uint8)
    expected = [
        np.mean([abs(int(a) - int(b)) / 255 for a, b in zip(one.ravel(), two.ravel(), strict=True)])
        for one, two in zip(frames, frames[1:], strict=False)
    ]
    assert changes_between(frames) == pytest.approx(expected, abs=1e-6)


def test_a_film_is_sampled_within_its_times():
    clip = Clip(np.stack([np.full((16, 16, 3), i, np.uint8) for i in range(40)]), 8.0)  # frame i at i / 8 seconds
    for value in (clip, video_bytes(clip)):
        found = [(time, frame.to_ndarray(format="rgb24")[0, 0, 0]) for time, frame in sampled(value, 2.0, 1.0, 3.0)]
        assert [time for time, _ in found] == pytest.approx([1.0, 1.5, 2.0, 2.5], abs=0.01)
        assert [level for _, level in found] == [8, 12, 16, 20]


class ColourEmbedder:
    """A caption is a unit vector along the axis that it names, a picture one along its strongest colour."""

    axes = {"red": 0, "green": 1, "blue": 2}

    def encode(self, instances):
        rows = []
        for instance in instances:
            assert not {"image", "text"} <= set(instance)
            if "image" in instance:
                axis = int(np.asarray(instance["image"]).reshape(-1, 3).sum(0).argmax())
            else:
                axis = next(axis for name, axis in self.axes.items() if name in instance["text"])
            rows.append(np.eye(3)[axis])
        return np.stack(rows).astype(np.float32)


def test_a_picture_that_its_caption_does_not_fit_is_left_out(tmp_path):
    assets = [Asset(name, "image", picture(name)) for name in ("red", "lime", "blue")]
    said = {"red": "a red wall", "lime": "a blue wall", "blue": "a blue wall"}
    asked = Counter()

    def annotator(chat, schema):
        value = chat[1]["content"][0]["image"]
        name = next(asset.id for asset in assets if asset.value is value)
        asked[schema["title"], name] += 1
        changes = {"caption": said[name]} if schema["title"] == "caption" else {}
        return json.dumps(good_answer(schema["title"]) | changes)

    made = run(assets, ["image_ret"], annotator, tmp_path, embedder=ColourEmbedder(), min_similarity=0.5)
    assert len(made["image_ret"]) == 2 and rejects_of(tmp_path) == {"caption does not fit": ["lime"]}
    assert ("image_ret", "lime") not in asked  # it costs no annotation
    answers = Journal(tmp_path).answers["similarity"]
    assert answers == {"red": 1.0, "blue": 1.0}


def test_no_category_fills_the_pool():
    assets = [Asset(str(i), "image", None) for i in range(100)]
    category = {str(i): "cat" if i < 90 else f"rare {i % 2}" for i in range(100)}
    kept = balance(assets, category, 7, seed=0)
    assert Counter(category[asset.id] for asset in kept) == {"cat": 7, "rare 0": 5, "rare 1": 5}
    assert [int(asset.id) for asset in kept] == sorted(int(asset.id) for asset in kept)
    assert balance(assets, category, None, seed=0) == assets
    assert balance(assets, category, 7, seed=1) != kept
    fewer = [asset for asset in assets if asset in kept or int(asset.id) % 3]
    assert balance(fewer, category, 7, seed=0) == kept  # what is chosen does not hang on what was not


def test_a_quality_filter_and_a_limit_per_category_save_questions(tmp_path):
    assets = [*pictures(10), Asset("thin.png", "image", png_bytes(Image.new("RGB", (1000, 20))))]
    asked = Counter()

    def annotator(chat, schema):
        asked[schema["title"]] += 1
        return json.dumps(good_answer(schema["title"]))

    made = run(assets, ["image_cls"], annotator, tmp_path, per_category=4)
    assert asked == {"caption": 10, "image_cls": 4} and len(made["image_cls"]) == 4
    assert made["image_cls"].meta["report"]["quality"] == {"passed": 10, "too long and thin": 1}


# ---------------------------------------------------------------- tasks and their answers


@pytest.mark.parametrize("name", TASKS)
def test_a_task_has_a_valid_schema_and_takes_an_answer_that_follows_it(name):
    task = TASKS[name]
    jsonschema.Draft202012Validator.check_schema(task.schema)
    assert list(task.schema["properties"])[0] == "description"  # described before anything is concluded from it
    assert task.schema["required"] == list(task.schema["properties"])
    for field in task.schema["properties"]:
        assert f"`{field}`" in task.request
    assert checked("```json\n" + json.dumps(good_answer(name)) + "\n```", task) == good_answer(name)
    for field in task.schema["properties"]:
        answer = {key: value for key, value in good_answer(name).items() if key != field}
        with pytest.raises(Rejected, match="not of the schema"):
            checked(json.dumps(answer), task)
    with pytest.raises(Rejected, match="not of the schema"):
        checked(json.dumps(good_answer(name) | {"note": "x"}), task)


def test_the_limits_are_the_reports():
    for name, task in TASKS.items():
        most = {"image": 500, "video": 300}[task.kind]
        checked(json.dumps(good_answer(name) | {"description": "a " * most}), task)
        with pytest.raises(Rejected, match=f"description has {most + 1} words, at most {most}"):
            checked(json.dumps(good_answer(name) | {"description": "a " * (most + 1)}), task)
    assert set(TASKS["image_qa"].schema["properties"]) == {
        "description", "task_type", "question", "positive_answer", "hard_negative_answer"}  # fmt: skip
    assert set(TASKS["video_cls"].schema["properties"]) == {"description", "task_type", "label", "misleading_label"}


@pytest.mark.parametrize(
    "moments, reason",
    [
        ((1, 3, 6, 8), None),
        ((6, 8, 1, 3), None),
        ((3, 1, 6, 8), "no moments"),
        ((1, 1.5, 6, 8), "no moments"),
        ((-1, 3, 6, 8), "no moments"),
        ((float("nan"), 3, 6, 8), "no moments"),
        ((1, 3, 4, 8), "no gap between moments"),
        ((1, 5, 2, 4), "no gap between moments"),
        ((1, 3, 6, 12), "moment outside the video"),
    ],
)
def test_moments_lie_apart_within_the_video(moments, reason):
    task = TASKS["video_mret"]
    answer = json.dumps(good_answer("video_mret") | dict(zip(task.numbers, moments, strict=True)))
    if reason is None:
        assert checked(answer, task, seconds=10.0) == json.loads(answer)
        return
    with pytest.raises(Rejected) as found:
        checked(answer, task, seconds=10.0)
    assert found.value.reason == reason


def test_moments_become_segments_of_their_film_and_now_and_then_a_keyframe(tmp_path):
    film = Clip(np.stack([np.full((48, 48, 3), 5 * i, np.uint8) for i in range(40)]), 4.0)  # 10 seconds
    assets = [Asset(str(i), "video", film) for i in range(4)]

    def annotator(chat, schema):
        return json.dumps(good_answer(schema["title"]))

    made = run(assets, ["video_mret"], annotator, tmp_path)
    quadruple = made["video_mret"]
    validate(load_quadruple(tmp_path / "video_mret", streaming=True))
    [right], [wrong] = quadruple.relevance[0].positives, quadruple.relevance[0].negatives
    levels = [quadruple.corpus[d]["video"].frames[:, 0, 0, 0].tolist() for d in (right, wrong)]
    assert levels == [[20, 30, 40, 50], [120, 130, 140, 150]]  # seconds 1 to 3 and 6 to 8, two frames a second
    assert [("image" in query) for query in quadruple.queries] == [True, False, False, True]
    assert int(quadruple.queries[0]["image"][0, 0, 0]) in levels[0]


def test_a_query_has_the_instruction_of_its_type(tmp_path):
    def annotator(chat, schema):
        changes = {} if schema["title"] == "caption" else {"task_type": "landmark", "label": "Eiffel Tower"}
        return json.dumps(good_answer(schema["title"]) | changes)

    quadruple = run(pictures(2), ["image_cls"], annotator, tmp_path)["image_cls"]
    assert {query["instruction"] for query in quadruple.queries} == {"Name the landmark in the image."}
    assert "text" not in quadruple.queries[0] and len(quadruple.corpus) == 2  # equal labels are one document
    assert {r.positives for r in quadruple.relevance} == {(0,)}


def test_an_asset_gets_one_task_of_its_kind(tmp_path):
    films = [Asset(f"{i}.mkv", "video", Clip(moving(), 4.0)) for i in range(3)]
    seen = Counter()

    def annotator(chat, schema):
        if schema["title"] != "caption":
            seen[schema["title"], chat[1]["content"][0]["type"]] += 1
        return json.dumps(good_answer(schema["title"]))

    made = run([*pictures(20), *films], ["image_qa", "image_ret", "video_ret"], annotator, tmp_path)
    assert sum(seen.values()) == 23 and set(seen) == {
        ("image_qa", "image"), ("image_ret", "image"), ("video_ret", "video")}  # fmt: skip
    assert len(made["image_qa"]) + len(made["image_ret"]) == 20 and len(made["video_ret"]) == 3
    assert min(len(made["image_qa"]), len(made["image_ret"])) >= 4


# ---------------------------------------------------------------- without a model, and from a folder


def test_emoji_world_annotates_itself(tmp_path):
    scenes = [Asset(f"s{i}", "image", q["image"]) for i, q in enumerate(build("image_qa", "train", 12, 0).queries)]
    single = Scene((Placed("1f431", "noto"),), pixels=64)
    films = [Asset("f", "video", Film((Track(Placed("1f431", "noto", size=0.5), "left"),), pixels=96))]
    tasks = ["image_cls", "image_qa", "image_ret", "video_cls", "video_ret"]
    made = run([*scenes, Asset("cat", "image", single), *films], tasks, EmojiAnnotator(), tmp_path)
    assert sum(len(quadruple) for quadruple in made.values()) == 14
    for quadruple in made.values():
        validate(quadruple)
    labels = run([Asset("cat", "image", single)], ["image_cls"], EmojiAnnotator(), tmp_path / "cat")["image_cls"]
    right, wrong = labels.corpus
    assert right["text"] == words.name("1f431") and wrong["text"] != right["text"]
    with pytest.raises(ValueError, match="no answer to 'visdoc' about a Scene"):
        EmojiAnnotator()(messages(TASKS["visdoc"], single), TASKS["visdoc"].schema)


def test_the_command_makes_a_folder_of_quadruples_from_a_folder_of_files(serve, tmp_path, capsys):
    pool = tmp_path / "pool"
    (pool / "deep").mkdir(parents=True)
    for i in range(3):
        picture((8 * i, 100, 200)).save(pool / "deep" / f"{i}.PNG")
    Image.new("RGB", (1, 1000)).save(pool / "thin.png")
    (pool / "notes.txt").write_text("not an asset")
    assert [(asset.id, asset.kind) for asset in assets_in(pool)] == [
        *((f"deep/{i}.PNG", "image") for i in range(3)), ("thin.png", "image")]  # fmt: skip
    command = [str(pool), "--task", "image_qa", "--endpoint", serve(well).url, "--model", "qwen"]
    synthesis.main([*command, "--out", str(tmp_path / "out"), "--min-side", "16", "--workers", "2"])
    said = capsys.readouterr().out
    assert f"{tmp_path / 'out' / 'image_qa'}: 3 queries" in said and "too long and thin" in said
    assert len(load_quadruple(tmp_path / "out" / "image_qa", streaming=True)) == 3
    synthesis.main([*command, "--out", str(tmp_path / "out"), "--min-side", "16", "--json"])
    assert json.loads(capsys.readouterr().out)["sets"]["image_qa"]["queries"] == 3
    with pytest.raises(ValueError, match="holds no file that ends in one of"):
        assets_in(tmp_path / "out" / "image_qa")
