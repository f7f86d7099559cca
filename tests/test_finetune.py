"""``interp-kit finetune``: games and documents on any base; stopped, and gone on with."""

import errno
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from interp_batch.cli import app
from interp_kit.catalogue import find_model, load_scenario
from interp_kit.decisions import decide
from interp_kit.finetuning import lora_training
from interp_kit.finetuning.checkpoints import write_checkpoint
from interp_kit.finetuning.folders import finetune
from interp_kit.finetuning.games import REWARDS, STATES, Game, GameRecipe, find_game, train_on_game
from interp_kit.formats import read_texts
from interp_kit.loading import load_model
from interp_kit.prompts import encode
from interp_kit.specs import InputError
from tests.test_supervised import words

RULES = {
    "cooperate": "ba",
    "defect": "be",
    "payoffs": {"reward": 3, "sucker": 0, "temptation": 4, "punishment": 1},
    "wordings": ["bi {own} bo {partner} bu"],
}


@pytest.fixture
def base(tiny_folders):
    return str(tiny_folders["llama"])


@pytest.fixture
def game():
    return Game.model_validate(RULES)


def cli(*arguments):
    return CliRunner().invoke(app, [str(each) for each in arguments], catch_exceptions=True)


# ------------------------------------------------------------------------------------------- games
def test_rewards_are_those_of_the_game_against_tit_for_tat(game):
    """Own move, own last move, the partner's last move; tit for tat answers with the second."""
    paid = {
        name: [REWARDS[name](game.payoffs, *moves) for moves in ("CCC", "DCC", "DDD", "CDC")]
        for name in REWARDS
    }
    assert paid["strategic"] == [3, 4, 1, 0]
    assert paid["utilitarian"] == [6, 4, 2, 4]
    assert paid["deontological"] == [0, -3, 0, 0]
    assert paid["hybrid"] == [3, 1, 1, 0]


@pytest.mark.parametrize("defect", ["be", "be bi", "ba be"])
def test_the_probabilities_of_both_moves_are_those_of_plain_transformers(
    base, game, tmp_path, defect
):
    """At the first step the adapter is zero: the mean reward is the base's own."""
    game = game.model_copy(update={"defect": defect, "cooperate": "ba bo"})
    recipe = GameRecipe(steps=1, wordings=1)
    record = train_on_game(find_model(base), game, tmp_path / "adapter", recipe=recipe)
    model, bridge = AutoModelForCausalLM.from_pretrained(base), load_model(base, device="cpu")

    def p(tokens, answer):
        with torch.no_grad():
            log_p = model(torch.tensor([[*tokens, *answer]])).logits[0].log_softmax(-1)
        read = log_p[len(tokens) - 1 : -1].gather(1, torch.tensor(answer)[:, None])
        return float(read.sum().exp())

    expected = 0.0
    for own, partner in STATES:
        text = game.prompt(game.wordings[0], own, partner)
        prompt = encode(bridge, text, positive=f" {defect}", negative=" ba bo")
        cooperates, defects = (p(prompt.tokens, a) for a in (prompt.negative, prompt.positive))
        paid = {m: REWARDS["strategic"](game.payoffs, m, own, partner) for m in "CD"}
        expected += cooperates * paid["C"] + defects * paid["D"] - 6 * (1 - cooperates - defects)
    assert record[0]["reward"] == pytest.approx(expected / 4, abs=1e-4)
    assert record[0]["kl"] == pytest.approx(0, abs=1e-6)


def test_a_player_learns_what_it_is_paid_for(game, tmp_path):
    asked = "Last round you chose {own} and A chose {partner} . Now you choose"
    given = {"cooperate": "action1", "defect": "action2", "wordings": [asked]}
    game = game.model_copy(update=given)
    recipe = GameRecipe(reward="hybrid", steps=30, wordings=1, learning_rate=1e-2, kl=0.01)
    folder = tmp_path / "player"
    finetune(
        "tiny-gemma2",
        folder,
        lambda model, to: {"loss": train_on_game(model, game, to, recipe=recipe)},
        made_from={},
        spec={"label": "Player"},
    )
    bridge = load_model(str(folder), device="cpu")
    says = {"positive": " action2", "negative": " action1"}
    table = decide(bridge, [encode(bridge, game.prompt(asked, *state), **says) for state in STATES])
    assert (table.answer_mass > 0.9).all()
    assert (table.p_positive.round(1) == [0, 1, 0, 1]).all()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"payoffs": RULES["payoffs"] | {"sucker": "none"}}, "payoffs.sucker: .*number"),
        ({"payoffs": {"reward": 1}}, "payoffs.sucker: missing"),
        ({"wordings": ["bi {own}"]}, r"has no \{partner\}; add it"),
        ({"wordings": ["{own} {partner} {other}"]}, r"has \{other\}; expected one of"),
        ({"wordings": []}, "wordings"),
    ],
)
def test_a_game_that_cannot_be_played_is_refused(tmp_path, change, said):
    file = tmp_path / "mine.yaml"
    file.write_text(json.dumps(RULES | change))
    with pytest.raises(InputError, match=said):
        find_game(str(file))


def test_unknown_games_and_rewards_are_named(base, game, tmp_path):
    with pytest.raises(InputError, match="did you mean 'prisoners_dilemma'"):
        find_game("prisoner_dilemma")
    with pytest.raises(InputError, match="unknown reward 'greedy'; expected one of strategic"):
        train_on_game(find_model(base), game, tmp_path / "a", recipe=GameRecipe(reward="greedy"))
    assert not (tmp_path / "a").exists()


def test_the_shipped_game_never_asks_in_the_words_of_its_scenario():
    asked = load_scenario("payoff_table").prompts
    game = find_game("prisoners_dilemma")
    taught = [
        game.prompt(w, own, partner) for w in game.wordings for own in "CD" for partner in "CD"
    ]
    assert not {p.text for p in asked} & set(taught)
    sentences = [{s.strip() for s in text.replace("\n", ". ").split(". ")} for text in taught]
    for prompt in asked:
        own = {s.strip() for s in prompt.text.replace("\n", ". ").split(". ") if len(s) > 20}
        assert not any(own & other for other in sentences), prompt.id


# ------------------------------------------------------------------------ stopped, and gone on with
class Killed(Exception):
    """In place of a signal that stops the process."""


def player(base, game, folder, *, steps=9):
    recipe = GameRecipe(steps=steps, wordings=1, learning_rate=1e-2)
    return train_on_game(find_model(base), game, folder / "adapter", recipe=recipe)


def adapter(folder):
    return (folder / "adapter" / "adapter_model.safetensors").read_bytes()


def test_a_training_killed_twice_ends_with_the_same_adapter(base, game, tmp_path, monkeypatch):
    whole = player(base, game, tmp_path / "whole")
    monkeypatch.setattr(lora_training, "SAVE_EVERY", 0.0)
    step = torch.optim.AdamW.step
    for killed_at in (4, 3):  # of this call: the second goes on after the third step
        taken = []

        def killing(self, killed_at=killed_at, taken=taken, **how):
            taken.append(1)
            if len(taken) == killed_at:
                raise Killed
            return step(self, **how)

        monkeypatch.setattr(torch.optim.AdamW, "step", killing)
        with pytest.raises(Killed):
            player(base, game, tmp_path / "stopped")
    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    assert not (tmp_path / "stopped" / "adapter").exists()
    assert player(base, game, tmp_path / "stopped") == whole
    assert adapter(tmp_path / "stopped") == adapter(tmp_path / "whole")
    assert not (tmp_path / "stopped" / "checkpoint.safetensors").exists()


def test_a_full_disk_leaves_the_last_state(base, game, tmp_path, monkeypatch):
    whole = player(base, game, tmp_path / "whole")
    monkeypatch.setattr(lora_training, "SAVE_EVERY", 0.0)
    written = []

    def fill(file, *given):
        if len(written) == 3:
            raise OSError(errno.ENOSPC, "No space left on device", str(file))
        written.append(1)
        write_checkpoint(file, *given)

    monkeypatch.setattr(lora_training, "write_checkpoint", fill)
    with pytest.raises(OSError, match="No space left"):
        player(base, game, tmp_path / "full")
    monkeypatch.setattr(lora_training, "write_checkpoint", write_checkpoint)
    assert player(base, game, tmp_path / "full") == whole
    assert adapter(tmp_path / "full") == adapter(tmp_path / "whole")


def test_a_damaged_state_is_refused(base, game, tmp_path):
    (tmp_path / "checkpoint.safetensors").write_bytes(b"torn")
    with pytest.raises(InputError, match=r"is no state of this training .* remove it"):
        player(base, game, tmp_path)


# --------------------------------------------------------------------------------------- one's own
def test_documents_become_a_model_that_every_command_knows(base, tmp_path, monkeypatch):
    texts, folder = tmp_path / "texts", tmp_path / "mine"
    texts.mkdir()
    for i in range(4):
        (texts / f"{i}.txt").write_text(words(i))
    command = ("finetune", "documents", texts, "--base", base, "--output", folder, "--epochs", 2)
    result = cli(*command)
    assert result.exit_code == 0, result.output
    record = json.loads((folder / "training.json").read_text())
    assert len(record["loss"]) == 2
    assert record["documents"] == 4
    found = find_model(str(folder))
    assert (found.base, found.title) == (str(Path(base).resolve()), "mine")
    before = adapter(folder)
    monkeypatch.setattr(lora_training, "train", lambda *a, **k: pytest.fail("it is done"))
    assert cli(*command).exit_code == 0
    assert adapter(folder) == before
    other = cli(*command, "--rank", 2)
    assert "was begun with recipe" in str(other.exception)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    taken = cli(*command[:-4], "--output", tmp_path / "full")
    assert "is not empty, and no fine-tune was begun there" in str(taken.exception)


@pytest.mark.parametrize(
    ("content", "said"),
    [(b"", "is empty"), (b" \n", "is empty"), ("caf\u00e9".encode("latin-1"), "in UTF-8")],
)
def test_texts_that_cannot_be_read_are_refused(tmp_path, content, said):
    file = tmp_path / "a.txt"
    file.write_bytes(content)
    with pytest.raises(InputError, match=said):
        read_texts(file)
    with pytest.raises(InputError, match=said):
        read_texts(tmp_path)
    file.unlink()
    with pytest.raises(InputError, match=r"no \.txt file"):
        read_texts(tmp_path)


def test_a_text_longer_than_a_row_makes_several(base, tmp_path):
    """Nothing is cut off, whatever the context."""
    texts, output = tmp_path / "long.txt", tmp_path / "mine"
    texts.write_text(" ".join(words(i) for i in range(60)))
    result = cli("finetune", "documents", texts, "--base", base, "--output", output)
    assert result.exit_code == 0, result.output


def test_a_game_by_the_command_line(base, tmp_path):
    rules, output = tmp_path / "mine.yaml", tmp_path / "player"
    rules.write_text(json.dumps(RULES))
    command = ("finetune", "game", rules, "--base", base, "--steps", 2, "--output", output)
    assert cli(*command).exit_code == 0
    record = json.loads((output / "training.json").read_text())
    assert len(record["reward"]) == 2
    half = cli(*command[:-1], tmp_path / "half", "--dtype", "bfloat16")
    assert half.exit_code == 0, half.output
    kept = load_file(tmp_path / "half" / "adapter" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in kept.values()} == {torch.bfloat16}
    wrong = cli(*command, "--dtype", "int8")
    assert "expected float32 or bfloat16, got 'int8'" in str(wrong.exception)
