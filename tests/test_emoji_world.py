"""Emoji World: sources as recorded, labels exact, splits by content, the same everywhere."""

import hashlib
import re
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from q3vl_mini.config import data_dir
from q3vl_mini.emoji_world import sprites, tasks, words
from q3vl_mini.emoji_world.augment import augment, backgrounds
from q3vl_mini.emoji_world.scenes import MOTIONS, Crop, Film, Frame, Page, Placed, Scene, Track, _drawing
from q3vl_mini.records import validate

IN_EVERY_SPLIT = [name for name in tasks.TASKS if name != "unseen_languages"]
APPLE, CAT = "1f34e", "1f408"


def pictures(quadruple):
    """Every drawn thing of a quadruple."""
    for instance in (*quadruple.queries, *quadruple.corpus):
        yield from (instance[m] for m in ("image", "video") if m in instance)


def placed(drawing) -> list[Placed]:
    """The objects in a drawing that carry meaning (no clutter)."""
    if isinstance(drawing, Crop):
        return placed(drawing.scene)
    if isinstance(drawing, Frame):
        return placed(drawing.film)
    if isinstance(drawing, Film):
        return [t.thing for t in drawing.tracks]
    if isinstance(drawing, Page):
        return [Placed(key, style) for block in drawing.blocks for style, key in block.icons]
    return list(drawing.objects)


def texts(quadruple) -> set[str]:
    return {i["text"] for i in (*quadruple.queries, *quadruple.corpus) if "text" in i}


# --- sources ------------------------------------------------------------------------------------------------


def test_sources_are_the_recorded_ones():
    folder = data_dir() / "emoji_world"
    recorded = re.findall(r"^(\w{64})  (.+)$", (folder / "SHA256SUMS").read_text(), flags=re.M)
    assert len(recorded) == 7
    for digest, name in recorded:
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest, name


def test_every_concept_is_drawn_in_every_training_style_and_over_900_in_each_test_style():
    keys = [c.key for c in sprites.concepts()]
    assert len(keys) == len(set(keys)) >= 1500
    for style in sprites.TRAIN_STYLES:
        assert all(sprites.has_style(style, k) for k in keys)
    for style in sprites.TEST_STYLES:
        assert sum(sprites.has_style(style, k) for k in keys) >= 900


def test_names_exist_in_at_least_35_languages_and_several_scripts():
    codes = sprites.languages()
    assert len(codes) >= 35 and set(sprites.UNSEEN_LANGUAGES) < set(codes)
    assert sprites.name_in("de", CAT) == "Katze" and sprites.name_in("zh", CAT) == "猫"
    scripts = {re.sub(r"[\W\d]", "", sprites.name_in(c, CAT))[:1] > "\u024f" for c in codes}
    assert scripts == {True, False}


def test_a_sprite_is_premultiplied_so_that_no_colour_exceeds_its_alpha():
    rgba = sprites.sprite("noto", CAT, 64)
    assert rgba.shape == (64, 64, 4) and 0 < (rgba[..., 3] == 255).mean() < 1
    assert (rgba[..., :3] <= rgba[..., 3:]).all()


# --- drawing ------------------------------------------------------------------------------------------------


def test_a_scene_is_the_same_picture_at_every_size():
    things = (Placed(APPLE, "noto", 0.25, 0.25, 0.4), Placed(CAT, "twemoji", 0.75, 0.75, 0.4))
    small = np.asarray(Scene(things, "blue", pixels=64).render(), np.float32)
    large = np.asarray(Scene(things, "blue", pixels=256).render(), np.float32)
    reduced = large.reshape(64, 4, 64, 4, 3).mean((1, 3))
    assert np.abs(small - reduced).mean() < 4
    assert np.abs(small - reduced[::-1]).mean() > 15  # a scene drawn upside down would be noticed


def test_blending_equals_the_slow_formula_pixel_by_pixel():
    scene = Scene((Placed(CAT, "noto", 0.5, 0.5, 0.5),), "green", pixels=64)
    ground = np.asarray(Scene((), "green", pixels=64).render())
    rgba = sprites.sprite("noto", CAT, 32)
    expected = ground.astype(int).copy()
    for y in range(32):
        for x in range(32):
            alpha = int(rgba[y, x, 3])
            for c in range(3):
                under = expected[16 + y, 16 + x, c] * (255 - alpha) // 255
                expected[16 + y, 16 + x, c] = min(255, rgba[y, x, c] + under)
    assert np.array_equal(np.asarray(scene.render()), expected)


def test_a_crop_shows_the_pixels_of_its_part():
    scene = Scene((Placed(APPLE, "noto", 0.25, 0.25, 0.4), Placed(CAT, "noto", 0.75, 0.75, 0.4)), pixels=128)
    whole = np.asarray(scene.render())
    assert np.array_equal(np.asarray(Crop(scene, 0.25, 0.25).render()), whole[:64, :64])
    assert np.array_equal(np.asarray(Crop(scene, 0.75, 0.75).render()), whole[64:, 64:])


@pytest.mark.parametrize("motion", [m for m in MOTIONS if m != "spin"])
def test_a_film_shows_the_motion_it_names(motion):
    film = Film((Track(Placed(APPLE, "noto", 0.5, 0.5, 0.4), motion),), "white", pixels=96)
    ink = (film.render().frames.astype(int) != 255).any(-1)  # (T, H, W)
    area = ink.sum((1, 2))

    def centre(frame):
        y, x = np.nonzero(frame)
        return x.mean(), y.mean()

    if motion in ("appear", "vanish"):
        first, last = (area[0], area[-1]) if motion == "vanish" else (area[-1], area[0])
        assert first > 0 and last == 0
        return
    (x0, y0), (x1, y1) = centre(ink[0]), centre(ink[-1])
    moved = {"left": x0 - x1, "right": x1 - x0, "up": y0 - y1, "down": y1 - y0}
    for direction, distance in moved.items():
        if direction == motion:
            assert distance > 20
    if motion in ("grow", "shrink", "still"):
        assert max(map(abs, moved.values())) < 2
        ratio = area[-1] / area[0]
        assert {"grow": ratio > 3, "shrink": ratio < 1 / 3, "still": ratio == 1}[motion]


def test_augmentation_of_no_strength_is_the_drawing_itself_and_full_strength_is_not():
    rgba = torch.from_numpy(np.stack([sprites.sprite("noto", k, 64) for k in (APPLE, CAT)]))
    ink = rgba[..., 3] == 255

    def changed(strength):
        out = augment(rgba, 64, strength, torch.Generator().manual_seed(0))
        assert out.shape == (2, 3, 64, 64) and 0 <= out.min() and out.max() <= 1
        return (out.permute(0, 2, 3, 1)[ink] - rgba[..., :3][ink] / 255).abs().mean().item()

    assert changed(0.0) < 0.02 < 0.1 < changed(1.0)


def test_augmented_backgrounds_have_every_pattern_that_scenes_have():
    made = backgrounds(400, 64, 1.0, torch.Generator().manual_seed(0))
    assert made.shape == (400, 3, 64, 64) and 0 <= made.min() and made.max() <= 1
    jumps = (made[..., 1:] - made[..., :-1]).abs().amax(1) > 0.02  # a pattern has hard edges, a gradient has none
    patterned = jumps.flatten(1).float().mean(1) > 0.02
    assert 0.2 < patterned.float().mean() < 0.5


def test_another_hand_draws_the_same_thing_otherwise_and_the_same_every_time():
    own = Scene((Placed(APPLE, "noto", size=0.8),))
    other = replace(own, objects=(replace(own.objects[0], hand=7),))
    drawn = other.array()
    _drawing.cache_clear()
    assert np.array_equal(drawn, other.array()) and not np.array_equal(drawn, own.array())
    ink = [(scene.array() < 250).any(-1).sum() for scene in (own, other)]
    assert 0.4 < ink[1] / ink[0] < 1.6
    third = replace(own, objects=(replace(own.objects[0], hand=8),))
    assert not np.array_equal(drawn, third.array())


def test_another_hand_keeps_a_colour_that_is_a_label():
    for hand in range(1, 30):
        red = Scene((Placed(CAT, "noto", size=0.9, tint="red", hand=hand),)).array().astype(int)
        ink = red.min(-1) < 120
        assert (red[ink][:, 0] > red[ink][:, 2]).mean() > 0.9


def test_other_hands_draw_for_training_alone():
    hands = {}
    for split in tasks.SPLITS:
        scenes = [document["image"] for document in tasks.build("text_to_image", split, 200).corpus]
        hands[split] = [thing.hand for scene in scenes for thing in scene.objects]
    assert not any(hands["validation"]) and not any(hands["test"])
    assert 0.35 < np.mean([hand > 0 for hand in hands["train"]]) < 0.65


# --- tasks --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", tasks.SPLITS)
@pytest.mark.parametrize("name", IN_EVERY_SPLIT)
def test_every_task_gives_a_valid_quadruple_in_every_split(name, split):
    quadruple = tasks.build(name, split, 40, seed=3)
    validate(quadruple)
    assert len(quadruple) == 40 and quadruple.meta == {"split": split, "seed": 3}


def test_unseen_languages_exist_in_the_test_split_alone():
    validate(tasks.build("unseen_languages", "test", 40))
    with pytest.raises(ValueError, match="test split only"):
        tasks.build("unseen_languages", "train", 40)


def test_an_unknown_task_or_split_is_named_with_the_choices():
    with pytest.raises(ValueError, match="unknown task 'concepts'.*grounding"):
        tasks.build("concepts")
    with pytest.raises(ValueError, match="unknown split 'dev'.*validation"):
        tasks.build("concept", "dev")


def test_the_same_arguments_give_the_same_data_in_another_process():
    code = (
        "from q3vl_mini.emoji_world import tasks; import hashlib\n"
        "qs = [tasks.build(n, 'train', 20, 5) for n in tasks.TASKS if n != 'unseen_languages']\n"
        "print(hashlib.sha256(repr([(q.queries, q.corpus, q.relevance) for q in qs]).encode()).hexdigest())"
    )
    digests = set()
    for hash_seed in ("0", "1"):  # the order of Python's sets must not matter
        out = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, env={"PYTHONHASHSEED": hash_seed}, check=True
        )
        digests.add(out.stdout.strip())
    assert len(digests) == 1
    a, b = tasks.build("concept", "train", 20, 5), tasks.build("concept", "train", 20, 6)
    assert a.queries != b.queries


@pytest.mark.parametrize("name", IN_EVERY_SPLIT)
def test_test_styles_are_in_the_test_split_alone(name):
    for split in tasks.SPLITS:
        allowed = sprites.TEST_STYLES if split == "test" else sprites.TRAIN_STYLES
        for drawing in pictures(tasks.build(name, split, 40)):
            clutter = getattr(drawing, "clutter", ())
            assert all(thing.style in allowed for thing in (*placed(drawing), *clutter)), (split, drawing)


def test_held_out_pairs_of_concepts_never_share_a_training_picture():
    def pairs(split):
        found = set()
        for name in ("image_qa", "scene_retrieval", "grounding", "video_qa", "moment", "visual_document"):
            for drawing in pictures(tasks.build(name, split, 150)):
                keys = sorted({thing.key for thing in placed(drawing)})
                found |= {(a, b) for i, a in enumerate(keys) for b in keys[i + 1 :]}
        return found

    train, test = pairs("train"), pairs("test")
    assert len(train) > 500 and not {pair for pair in train if tasks.bucket(*pair) < 2}
    assert len({pair for pair in test if tasks.bucket(*pair) == 0}) > 300


def test_held_out_colourings_are_not_in_training():
    def colourings(split):
        drawings = [d for name in ("text_to_image", "composed") for d in pictures(tasks.build(name, split, 200))]
        return {(t.key, t.tint) for d in drawings for t in placed(d) if t.tint}

    buckets = {split: {tasks.bucket(*pair) for pair in colourings(split)} for split in tasks.SPLITS}
    assert buckets == {"train": set(range(2, 10)), "validation": {1}, "test": {0}}


TEXT_TASKS = ("visual_document", "keyword_search", "text_group", "similarity", "cross_lingual")


@pytest.mark.parametrize("name", TEXT_TASKS)
def test_no_held_out_query_has_its_answer_in_training_word_for_word(name):
    def asked(split, n, seed):
        quadruple = tasks.build(name, split, n, seed)
        answers = [quadruple.corpus[labels.positives[0]] for labels in quadruple.relevance]
        said = [answer["text"] if "text" in answer else answer["image"].heading for answer in answers]
        return {(q["text"].lower(), a.lower()) for q, a in zip(quadruple.queries, said, strict=True)}

    seen = asked("train", 2000, 0) | asked("train", 2000, 1)
    assert len(seen) > 1000
    for split in ("validation", "test"):
        held_out = asked(split, 300, 1)
        assert len(held_out) > 150 and not held_out & seen


def test_a_held_out_concept_is_never_sorted_into_its_category_in_training():
    def concepts(split):  # a query is a name, a name and keywords, or keywords alone
        names = {query["text"].split(":")[0] for query in tasks.build("text_group", split, 2000).queries}
        return {words.name(c.key) for c in sprites.concepts()} & names

    shown = {split: concepts(split) for split in tasks.SPLITS}
    assert len(shown["train"]) > 500 and len(shown["test"]) > 50 and len(shown["validation"]) > 50
    assert not shown["train"] & (shown["test"] | shown["validation"]) and not shown["test"] & shown["validation"]


def test_no_training_text_is_in_an_unseen_language():
    said = texts(tasks.build("cross_lingual", "train", 1500)) | texts(tasks.build("image_to_text", "train", 500))

    def names(codes):
        return {sprites.name_in(code, k.key) for code in codes for k in sprites.concepts()}

    only_unseen = names(sprites.UNSEEN_LANGUAGES) - names(set(sprites.languages()) - set(sprites.UNSEEN_LANGUAGES))
    assert len(only_unseen) > 5000 and not said & only_unseen


def test_counting_answers_equal_the_number_of_objects():
    quadruple, counted = tasks.build("image_qa", "train", 600), 0
    for query, labels in zip(quadruple.queries, quadruple.relevance, strict=True):
        if re.match("How many|Count|How often", query["text"]):
            counted += 1
            assert quadruple.corpus[labels.positives[0]]["text"] == words.NUMBERS[len(query["image"].objects)]
    assert counted > 20


def test_where_answers_are_where_the_pixels_are():
    quadruple, checked = tasks.build("image_qa", "train", 400), 0
    for query, labels in zip(quadruple.queries, quadruple.relevance, strict=True):
        answer = quadruple.corpus[labels.positives[0]]["text"]
        match = re.match(r"Where is the (.+)\?", query["text"])
        if not match:
            continue
        scene = query["image"]
        [thing] = [t for t in scene.objects if words.describe(t) == match[1]]
        alone = np.asarray(Scene((thing,), pixels=128).render()).astype(int)
        y, x = np.nonzero((alone != 255).any(-1))
        assert answer == f"{'top' if y.mean() < 64 else 'bottom'} {'left' if x.mean() < 64 else 'right'}"
        checked += 1
    assert checked > 10


def test_size_answers_compare_a_thing_with_the_others_of_its_picture():
    quadruple, said = tasks.build("image_qa", "train", 800), []
    for query, labels in zip(quadruple.queries, quadruple.relevance, strict=True):
        match = re.match(r"(?:How big is the |Which size is the |The )(.+?)(?:\?|: which size\?)$", query["text"])
        if not match or "colour" in query["text"]:
            continue
        [thing] = [t for t in query["image"].objects if words.describe(t) == match[1]]
        sizes = [t.size for t in query["image"].objects]
        assert min(sizes) < max(sizes)
        said.append(quadruple.corpus[labels.positives[0]]["text"])
        assert said[-1] == ("big" if thing.size == max(sizes) else "small")
    assert {"big", "small"} == set(said) and len(said) > 20


def test_every_picture_that_shows_what_the_query_asks_for_is_labelled():
    quadruple = tasks.build("text_to_image", "train", 2500)
    several = 0
    for labels in quadruple.relevance:
        wanted = tasks.shows(quadruple.corpus[labels.positives[0]]["image"])
        alike = tuple(r for r, d in enumerate(quadruple.corpus) if tasks.shows(d["image"]) == wanted)
        assert labels.positives == alike
        several += len(alike) > 1
    assert several > 100


def test_every_caption_that_is_right_for_a_picture_is_labelled():
    quadruple = tasks.build("image_to_text", "train", 2500)
    shown: dict = {}
    for query, labels in zip(quadruple.queries, quadruple.relevance, strict=True):
        if len(query["image"].objects) == 1:
            shown.setdefault(tasks.shows(query["image"]), set()).update(labels.positives)
    several = 0
    for query, labels in zip(quadruple.queries, quadruple.relevance, strict=True):
        if len(query["image"].objects) == 1:
            assert set(labels.positives) == shown[tasks.shows(query["image"])]
            several += len(labels.positives) > 1
    assert several > 100


def test_a_keyframe_is_a_picture_of_its_clip():
    quadruple = tasks.build("moment", "train", 60)
    keyed = [(q, r) for q, r in zip(quadruple.queries, quadruple.relevance, strict=True) if "image" in q]
    assert keyed
    for query, labels in keyed:
        assert query["image"].film == quadruple.corpus[labels.positives[0]]["video"]


def test_moments_next_to_the_right_one_are_not_called_wrong():
    quadruple = tasks.build("moment", "train", 60)
    for labels in quadruple.relevance:
        [right] = labels.positives
        assert all(abs(row - right) > 1 for row in labels.negatives) and labels.negatives


def test_the_instruction_alone_decides_which_answer_to_a_picture_is_right():
    quadruple = tasks.build("instructed", "validation", 200)
    kinds = {info.instruction: name for name, info in tasks.TASKS.items()}
    seen = set()
    for query, labels in zip(quadruple.queries, quadruple.relevance, strict=True):
        [thing] = query["image"].objects
        concept = sprites.concept_by_key()[thing.key]
        answers = {
            "concept": words.name(thing.key),
            "image_to_text": words.with_article(words.name(thing.key)),
            "subgroup": words.subgroup_label(concept.subgroup),
            "group": words.GROUPS[concept.group],
        }
        asked = kinds[query["instruction"]]
        [right] = [quadruple.corpus[row] for row in labels.positives]
        wrong = [quadruple.corpus[row] for row in labels.negatives]
        if asked == "same_thing":
            assert right["image"].objects[0].key == thing.key and right["image"].objects[0].style != thing.style
        else:
            assert right == {"text": answers[asked]}
        assert right not in wrong and len(wrong) >= 3
        seen.add(asked)
    assert seen == {*answers, "same_thing"}


def test_similarity_grades_follow_the_category_tree():
    assert tasks.likeness(CAT, CAT) == 5
    dog, banana = "1f415", "1f34c"
    assert tasks.likeness(CAT, CAT) > tasks.likeness(CAT, dog) > tasks.likeness(CAT, banana)


def test_the_benchmark_covers_every_task_and_the_unseen_styles_have_900_candidates():
    names = [q.name for q in tasks.benchmark(n=5)]
    assert sorted([*names, "instructed"]) == sorted(tasks.TASKS)
    for quadruple in tasks.unseen_styles():
        validate(quadruple)
        assert len(quadruple.corpus) >= 900
