"""The demo's page in Gradio: its layout (`build`) and its start (`launch`)."""

import os
from collections.abc import Sequence
from pathlib import Path
from threading import Thread

import gradio as gr
from gradio.utils import get_upload_folder
from starlette.middleware import Middleware

from ..choices import PRECISIONS
from ..memory import few_arenas
from . import markup
from .collections import Collections
from .engine import RERANKED, Engine
from .examples import INSTRUCTIONS, Example, examples
from .gallery import gallery
from .items import KINDS
from .models import Models
from .page import GALLERY, Page
from .remote import guard
from .room import RoomForUploads
from .shelf import Shelf
from .uploads import ACCEPTED

UPLOAD_LIMIT = "50mb"
QUEUE = 32  # events that wait; one more gets the answer that the queue is full (HTTP 503)
SESSIONS = 200  # open pages whose last answers Gradio keeps in memory; who was away longest loads it anew
AT_ONCE = 1  # runs of one kind of event; the models work on one query at a time (models.Models)
CLEANED, UPLOADS_KEPT = 900, 7200  # seconds between two looks at uploads, and after which one is deleted
SHOWN = 16  # items before the first search
STYLE = Path(__file__).with_name("style.css")
FONTS = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "Noto Sans", "sans-serif"]  # none is fetched
# A click on what carries an id selects it.
SELECT = """element.addEventListener('click', (event) => {
  const hit = event.target.closest('[data-id]');
  if (hit) trigger('select', {id: hit.dataset.id});
});"""
INTRO = """<div class="q3-head"><h1>Search by meaning</h1><p>
A small model turns words, pictures, clips and pages into vectors. What lies near your query is the answer.
</p></div>"""
ABOUT = """
**The models** are the stages of one training run, from the raw backbone to s3. They have ten million parameters and
learned on two CPU cores, so they are often wrong. Watch where, and what each stage changes.

**Settings.** Fewer *dimensions* keep the front of each vector (Matryoshka). *int8* and *binary* scan shorter codes, and
*rescoring* puts their first candidates in order by the full vectors. The *reranker* reads the query together with each
of the first results, and says yes or no.

**The gallery** is drawn by a program, in two styles of emoji that no training has seen: Noto Emoji v1 (Google,
Apache-2.0) and Emojione 2 (CC-BY-4.0), changed in colour, size and place. The pictures of the examples are Noto Emoji
(Google, Apache-2.0).
"""


def build(
    engine: Engine,
    shipped: Shelf,
    collections: Collections,
    folder: Path | None = None,
    public: bool = False,
    remote: bool = False,
) -> gr.Blocks:
    """The page. shipped: the gallery. folder, public, remote: see Page."""
    page = Page(engine, shipped, collections, folder, public, remote)
    title = "q3vl_mini: search by meaning"
    with gr.Blocks(title=title, analytics_enabled=False, delete_cache=(CLEANED, UPLOADS_KEPT)) as blocks:
        visitor = gr.BrowserState("", storage_key="q3vl_mini", secret="q3vl_mini")  # the key itself is the secret
        gr.HTML(INTRO)
        with gr.Tabs():
            with gr.Tab("Search"):
                place, (model, dim) = _search_tab(page, visitor)
            with gr.Tab("Compare"):
                compared_place, sides = _compare_tab(page, visitor)
            with gr.Tab("Map") as tab:
                map_place = _map_tab(page, visitor, tab)
            with gr.Tab("Pair scorer"):
                _pair_tab(page)
            with gr.Tab("Your collection"):
                chosen = _collection_tab(page, visitor, model, [place, compared_place, map_place])
            with gr.Tab("About"):
                gr.Markdown(ABOUT)
        blocks.load(page.arrive, visitor, [visitor, place, compared_place, map_place, chosen], show_progress="hidden")
        for chosen_model, slider in ((model, dim), *sides):
            blocks.load(page.widest, chosen_model, slider, show_progress="hidden")
    for block in blocks.blocks.values():
        block.keep_in_cache |= block.temp_files  # what the page itself shows, such as icons, while uploads are deleted
    guard(remote)
    return blocks.queue(max_size=QUEUE, default_concurrency_limit=AT_ONCE, api_open=False)  # nobody passes the queue


def launch(
    host: str | None = None,
    port: int | None = None,
    share: bool = False,
    folder: str | Path | None = None,
    models: Sequence[str] | None = None,
    reranker: str | None = "reranker",
    home: str | Path | None = None,
    public: bool | None = None,
    remote: bool = False,
    prevent_thread_lock: bool = False,
) -> gr.Blocks:
    """Start the demo and print its address; `close()` of what is returned stops it.

    Models are loaded, and the gallery's vectors made where they are not yet there, while the page is up already.

    Args:
        host, port: where it listens; "0.0.0.0" is every address of this machine. None is $GRADIO_SERVER_NAME or this
            machine alone, and a free port from 7860 on.
        share: also an address at gradio.live for 72 hours, for everybody who knows it.
        folder: below which the page may index files where they lie.
        models, reranker: checkpoints; see models.Models. The last of the models is the one to begin with.
        home: where vectors and collections are kept; None is $Q3VL_MINI_HOME, or .q3vl_mini in the user's folder.
        public: give each visitor collections of their own; None does so if it is shared or listens to more than this
            machine.
        remote: a query may be the address of a picture or clip on the public internet; see remote.fetch.
        prevent_thread_lock: return at once, as a notebook needs it.

    Taught in notebooks/16.
    """
    few_arenas()
    home = Path(home or os.environ.get("Q3VL_MINI_HOME") or Path.home() / ".q3vl_mini")
    engine, shipped = Engine(Models(models, reranker)), gallery(home / "gallery")
    host = host or os.environ.get("GRADIO_SERVER_NAME", "127.0.0.1")
    if public is None:
        public = share or host not in ("127.0.0.1", "localhost", "::1")
    collections = Collections(home / "collections")
    blocks = build(engine, shipped, collections, Path(folder) if folder is not None else None, public, remote)
    uploads = Path(get_upload_folder())
    uploads.mkdir(parents=True, exist_ok=True)
    blocks.launch(
        server_name=host,
        server_port=port,
        share=share,
        prevent_thread_lock=True,
        max_file_size=UPLOAD_LIMIT,
        state_session_capacity=SESSIONS,
        app_kwargs={"middleware": [Middleware(RoomForUploads, folder=uploads)]},
        show_error=False,  # what no line of the page says stays in the server's log
        theme=_theme(),
        css_paths=STYLE,
        footer_links=["settings"],
        ssr_mode=False,
    )
    Thread(target=_warm, args=(engine, shipped), daemon=True).start()
    if not prevent_thread_lock:
        blocks.block_thread()
    return blocks


def _theme() -> gr.themes.Base:
    """Soft, with plain labels and with text that has a contrast of at least 4.5 to what is behind it."""
    theme = gr.themes.Soft(primary_hue="teal", neutral_hue="slate", font=FONTS, font_mono=["monospace"])
    return theme.set(
        background_fill_primary="*neutral_50",  # `set` alone forgets Soft's
        body_text_color_subdued="*neutral_600",
        block_info_text_color="*neutral_600",
        block_label_background_fill="transparent",
        block_label_background_fill_dark="transparent",
        block_label_text_color="*body_text_color",
        block_title_background_fill="transparent",
        block_title_background_fill_dark="transparent",
        block_title_padding="0",
        block_title_text_color="*body_text_color",
        button_primary_background_fill="*primary_700",
        button_primary_background_fill_hover="*primary_800",
        button_primary_background_fill_dark="*primary_700",
        checkbox_label_background_fill_selected="*primary_700",
        checkbox_label_background_fill_selected_dark="*primary_700",
    )


def _warm(engine: Engine, shipped: Shelf) -> None:
    """Make the gallery's vectors for every model, the one that is chosen first (the last) before the others."""
    for model in reversed(engine.models.names):
        shipped.vectors(engine.models, model)


def _search_tab(page: Page, visitor: gr.BrowserState) -> tuple[gr.Dropdown, tuple[gr.Radio, gr.Slider]]:
    query = _box("What are you looking for?", "query")
    suggestions = examples(page.shipped.items)
    with gr.Row(elem_classes="q3-examples"):
        buttons = [_suggestion(page, suggestion, first=not n) for n, suggestion in enumerate(suggestions)]
    with gr.Row():
        with gr.Column(scale=5, min_width=300):
            said = gr.HTML(markup.status("Press a suggestion, or a picture to find more like it."), elem_id="said")
            first = page.shipped.items[:: max(len(page.shipped) // SHOWN, 1)][:SHOWN]
            results = gr.HTML(markup.plain_cards(first, pick=True), js_on_load=SELECT, elem_id="results")
        with gr.Column(scale=2, min_width=300):
            with gr.Group(elem_classes="q3-settings"):
                chosen = _settings(page)
            cost = gr.HTML(elem_id="cost")
            with gr.Group(elem_classes="q3-settings"):
                instruction, place = _instruction(), _places(page)
                kinds = gr.CheckboxGroup(list(KINDS), value=list(KINDS), label="Kinds")
    inputs, outputs = [query, instruction, place, kinds, *chosen, visitor], [said, results, cost]
    query.submit(page.search, inputs, outputs, show_progress="minimal")
    model, dim, *others = chosen
    changes = [component.input for component in (instruction, place, kinds, dim, *others)]
    gr.on(changes, page.search_again, inputs, outputs, show_progress="minimal", trigger_mode="always_last")
    fitted = model.input(page.fitted, [model, dim], dim, show_progress="minimal", trigger_mode="always_last")
    fitted.then(page.search_again, inputs, outputs, show_progress="minimal")
    for button, suggestion in zip(buttons, suggestions, strict=True):
        fill = button.click(_filled(page, suggestion), None, [query, instruction], show_progress="hidden")
        fill.then(page.search, inputs, outputs, show_progress="minimal")
    more = results.select(page.like_this, [place, visitor], [query, instruction, said], show_progress="hidden")
    more.then(page.search_again, inputs, outputs, show_progress="minimal")
    return place, (model, dim)


def _compare_tab(page: Page, visitor: gr.BrowserState) -> tuple[gr.Dropdown, list[tuple[gr.Radio, gr.Slider]]]:
    query = _box("One query, two searches", "compared-query")
    with gr.Row():
        place, instruction = _places(page), _instruction()
    names = page.models.names
    sides = []
    with gr.Row():
        for side, model in (("A", names[0]), ("B", names[-1])):
            with gr.Column(min_width=280), gr.Group(elem_classes="q3-settings"):
                sides.append(_settings(page, model, side))
    button = gr.Button("Compare", variant="primary")
    said = gr.HTML(markup.status("A and B search for the same; set them apart in one thing, and see what it changes."))
    with gr.Row():
        shown = []
        for side in "AB":
            with gr.Column(min_width=280):
                gr.Markdown(f"### Results of {side}")
                shown += [gr.HTML(elem_id=f"results-{side}"), gr.HTML()]
    inputs = [query, instruction, place, *sides[0], *sides[1], visitor]
    gr.on([query.submit, button.click], page.compare, inputs, [said, *shown], show_progress="minimal")
    for model, dim, *_ in sides:
        model.input(page.fitted, [model, dim], dim, show_progress="hidden", trigger_mode="always_last")
    return place, [(model, dim) for model, dim, *_ in sides]


def _map_tab(page: Page, visitor: gr.BrowserState, tab: gr.Tab) -> gr.Dropdown:
    with gr.Row():
        place = _places(page)
        model = gr.Dropdown(page.models.names, value=page.models.names[-1], label="Model")
        words = gr.Textbox(
            label="A query among them",
            placeholder="a bicycle",
            submit_btn="Draw",
            elem_id="map-query",
            elem_classes="q3-box",
        )
    said = gr.HTML(markup.status("Drawing the map …"))
    with gr.Row():
        with gr.Column(scale=3, min_width=300):
            legend = gr.HTML()
            drawn = gr.HTML(js_on_load=SELECT, elem_id="map")
        with gr.Column(scale=1, min_width=240):
            item = gr.Dropdown([], label="Item", info="Click the map, or choose by name")
            card = gr.HTML(elem_id="map-item")
    inputs, outputs = [place, model, words, visitor], [said, legend, drawn, item]
    gr.on([tab.select, words.submit, place.input, model.input], page.draw, inputs, outputs, show_progress="minimal")
    drawn.select(page.clicked, [place, visitor], [item, card], show_progress="hidden")
    item.input(page.shown, [place, item, visitor], card, show_progress="hidden")
    return place


def _pair_tab(page: Page) -> None:
    with gr.Row():
        query, document = _box("Query", "pair-query", send=False), _box("Document", "pair-document", send=False)
    with gr.Row():
        model = gr.Dropdown(page.models.names, value=page.models.names[-1], label="Embedding model")
        instruction = _instruction()
    button = gr.Button("Score this pair", variant="primary")
    said, score = gr.HTML(), gr.HTML(elem_id="pair")
    gr.on(
        [query.submit, document.submit, button.click],
        page.score_pair,
        [query, document, model, instruction],
        [said, score],
        show_progress="minimal",
    )


def _collection_tab(page: Page, visitor: gr.BrowserState, model: gr.Dropdown, places: list) -> gr.Dropdown:
    gr.Markdown(
        f"Add files of your own and search them: {ACCEPTED}. What a file is, is told by its content. It is kept on "
        "this server, decoded and made smaller, until you delete it" + (", for you alone." if page.public else ".")
    )
    with gr.Row():
        with gr.Column(scale=1, min_width=280):
            chosen = gr.Dropdown(
                [], label="Collection", info="Choose one, or type a new name", allow_custom_value=True, value=None
            )
            files = gr.File(label="Files", file_count="multiple", height=150, elem_id="files")
            more = gr.File(label="Or a folder of them", file_count="directory", height=150, elem_id="folder")
            place = f"In {page.folder}, read where it lies; . is all of it" if page.folder is not None else ""
            folder = gr.Textbox(label="Folder on this machine", info=place, visible=page.folder is not None)
            with gr.Row():
                start = gr.Button("Index", variant="primary", min_width=100)
                stop = gr.Button("Cancel", min_width=100)
            with gr.Accordion("Delete this collection", open=False):
                sure = gr.Checkbox(label="Yes, delete its files and vectors")
                delete = gr.Button("Delete", variant="stop")
        with gr.Column(scale=2, min_width=300):
            said, contents = gr.HTML(elem_id="indexing"), gr.HTML(elem_id="contents")
    asked = start.click(page.ask_to_index, visitor, said, show_progress="hidden")
    asked.then(
        page.index,
        [chosen, files, more, folder, model, visitor],
        [said, contents, chosen, *places, files, more],
        show_progress="hidden",
    )
    stop.click(page.cancel, visitor, show_progress="hidden")
    chosen.input(page.contents, [chosen, visitor], [said, contents], show_progress="hidden")
    delete.click(
        page.delete, [chosen, sure, visitor], [said, contents, chosen, *places, sure], show_progress="hidden"
    )
    return chosen


def _box(label: str, elem_id: str, send: bool = True) -> gr.MultimodalTextbox:
    return gr.MultimodalTextbox(
        label=label,
        placeholder="Words, a picture, a clip, or a mix",  # what a screen reader calls the field
        file_types=["image", "video"],
        file_count="multiple",
        sources=["upload"],
        submit_btn="Search" if send else False,
        elem_id=elem_id,
        elem_classes="q3-box",
    )


def _settings(page: Page, model: str | None = None, side: str = "") -> list:
    """model, dim, precision, rescore, rerank."""
    names = page.models.names
    with_reranker = page.models.reranker_path is not None
    return [
        gr.Radio(names, value=model or names[-1], label=f"Model {side}".strip()),
        gr.Slider(8, 256, value=256, step=8, label="Dimensions"),
        gr.Radio(list(PRECISIONS), value="float32", label="Precision of the index"),
        gr.Checkbox(True, label="Rescore", info="int8 and binary: put the first in order by the full vectors"),
        gr.Checkbox(False, label="Rerank", info=f"read the first {RERANKED} with the query", visible=with_reranker),
    ]


def _places(page: Page) -> gr.Dropdown:
    # the visitor's own collections join on arrival
    return gr.Dropdown(page.shipped_choice, value=GALLERY, label="Search in")


def _instruction() -> gr.Dropdown:
    return gr.Dropdown(
        list(INSTRUCTIONS), value=INSTRUCTIONS[0], label="Instruction", allow_custom_value=True,
        info="What to look for, told to the model; choose or write one",
    )  # fmt: skip


def _suggestion(page: Page, suggestion: Example, first: bool) -> gr.Button:
    icon = page.as_query(suggestion.picture)["files"][0] if suggestion.picture else None
    return gr.Button(suggestion.label, icon=icon, size="sm", variant="primary" if first else "secondary")


def _filled(page: Page, suggestion: Example):
    """The event that puts an example into the search box."""

    def fill() -> tuple[dict, str]:
        if suggestion.picture is None:
            return {"text": suggestion.text, "files": []}, suggestion.instruction
        return page.as_query(suggestion.picture, suggestion.text), suggestion.instruction

    return fill
