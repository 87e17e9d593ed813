"""What holds for every test: no network, one thread a worker, no window, the same seed."""

import os

if "PYTEST_XDIST_WORKER" in os.environ:  # read by OpenMP when torch and faiss are imported
    os.environ["OMP_NUM_THREADS"] = "1"
os.environ.update(  # child processes inherit these; the socket guard below is for this process alone
    HF_HUB_OFFLINE="1",
    HF_DATASETS_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    GRADIO_ANALYTICS_ENABLED="False",
    TOKENIZERS_PARALLELISM="false",
)

import ipaddress  # noqa: E402
import random  # noqa: E402
import socket  # noqa: E402

import matplotlib  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

# Not through MPLBACKEND: notebook kernels would inherit it and draw no inline figures.
matplotlib.use("Agg")
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)


class NetworkBlocked(RuntimeError):
    """Not an OSError: libraries answer those with retries or a silent fallback, and the test would pass."""


def is_local(host: str | bytes | None) -> bool:
    """True for the loopback, the wildcard address and no host at all."""
    host = host.decode() if isinstance(host, bytes) else host
    if not host or host == "localhost":
        return True
    try:
        address = ipaddress.ip_address(host.split("%")[0])
    except ValueError:
        return False
    return address.is_loopback or address.is_unspecified


def refuse(host, port) -> None:
    raise NetworkBlocked(
        f"a test tried to reach {host}:{port}. Tests run without a network: use what data_samples ships, "
        "make the data in the test, or start a server on 127.0.0.1"
    )


@pytest.fixture(scope="session", autouse=True)
def no_network():
    """Sockets reach this machine only; a look-up of another machine's name fails too."""
    connect, connect_ex, getaddrinfo = socket.socket.connect, socket.socket.connect_ex, socket.getaddrinfo

    def check(sock, address):
        if sock.family in (socket.AF_INET, socket.AF_INET6) and not is_local(address[0]):
            refuse(*address[:2])

    def guarded_connect(self, address):
        check(self, address)
        return connect(self, address)

    def guarded_connect_ex(self, address):
        check(self, address)
        return connect_ex(self, address)

    def guarded_getaddrinfo(host, port, *args, **kwargs):
        if not is_local(host):
            refuse(host, port)
        return getaddrinfo(host, port, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", guarded_connect)
        patch.setattr(socket.socket, "connect_ex", guarded_connect_ex)
        patch.setattr(socket, "getaddrinfo", guarded_getaddrinfo)
        yield


@pytest.fixture(autouse=True)
def seeded():
    """Every test starts from the same random state, whatever ran before it."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def small_checkpoint(tmp_path_factory):
    """A folder with a random Qwen3-VL of 2 + 2 layers and 64 dimensions, in Hub format, with a tokenizer of its own.

    Its weights are larger than a fresh model's, so that every part of a prompt shows in the output.
    """
    from q3vl_mini import tiny

    texts = ["yes", "no"] * 50 + [
        "Represent the user's input. Retrieve a picture of a red cat, then 12 green apples.",
        "Given a search query, retrieve relevant candidates that answer the query.",
        'Judge whether the Document meets the requirements. The answer can only be "yes" or "no".',
        "<Instruct>: <Query>: <Document>: <0.5 seconds> system user assistant NULL",
    ] * 20
    tokenizer = tiny.train_tokenizer(texts, vocab_size=600)
    config = tiny.make_config(tokenizer, width=64, vision_width=64, text_layers=2, vision_depth=2)
    model = tiny.make_model(config, tokenizer)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4 if parameter.ndim > 1 else 1)
        model.model.language_model.norm.weight.copy_(torch.linspace(0.5, 2, 64))  # a trained norm is not all ones
    folder = tmp_path_factory.mktemp("checkpoints") / "small"
    tiny.save(folder, model, tiny.make_processor(tokenizer))
    return folder


@pytest.fixture(scope="session")
def processor(small_checkpoint):
    """The processor of `small_checkpoint`."""
    from transformers import AutoProcessor

    return AutoProcessor.from_pretrained(small_checkpoint)
