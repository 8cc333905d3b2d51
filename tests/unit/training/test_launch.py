"""What the environment states about a process, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from fmg import Recipe
from fmg.core.errors import UsageError
from fmg.training.distributed import Shard
from fmg.training.launch import (
    Launch,
    Sizes,
    check_shares,
    choose_engine,
    choose_sizes,
    device_of,
    is_main_process,
    read_launch,
)
from tests.support.cli import fmg

PAIR = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
FSDP2 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_OFFLOAD_PARAMS": "false"}


def test_a_process_reads_its_place_from_the_environment() -> None:
    assert read_launch({}) == read_launch({"WORLD_SIZE": "1"}) == Launch()
    assert read_launch(PAIR) == Launch(1, 2, 1, 2)
    # on another machine the first process is not the first of the run
    assert read_launch({**PAIR, "RANK": "9", "WORLD_SIZE": "16"}) == Launch(9, 16, 1, 2)
    without_local = {name: value for name, value in PAIR.items() if name != "LOCAL_RANK"}
    assert read_launch(without_local).local_rank == 1
    assert (is_main_process({}), is_main_process({**PAIR, "RANK": "0"}), is_main_process(PAIR)) == (True, True, False)


MISUSES = (
    ({"RANK": ""}, "WORLD_SIZE is 2, but RANK is not set"),
    ({"MASTER_ADDR": ""}, "MASTER_ADDR is not set"),
    ({"MASTER_PORT": ""}, "MASTER_PORT is not set"),
    ({"MASTER_PORT": "70000"}, "which is not a port"),
    ({"RANK": "2"}, "RANK is 2, but there are 2 processes"),
    ({"RANK": "-1"}, "RANK is '-1'"),
    ({"WORLD_SIZE": "0"}, "WORLD_SIZE is '0'"),
    ({"WORLD_SIZE": "two"}, "WORLD_SIZE is 'two'"),
    ({"LOCAL_RANK": "x"}, "LOCAL_RANK is 'x'"),
    ({"LOCAL_RANK": "2", "LOCAL_WORLD_SIZE": "2"}, "LOCAL_RANK is 2, but LOCAL_WORLD_SIZE is 2"),
    ({"ACCELERATE_USE_DEEPSPEED": "true"}, "configured for DeepSpeed"),
    ({"ACCELERATE_USE_FSDP": "true"}, "the first version of FSDP"),
    ({**FSDP2, "FSDP_OFFLOAD_PARAMS": "true"}, "offload parameters"),
    ({"WORLD_SIZE": "1000", "RANK": "0"}, "1000 processes cannot share the 48 groups"),
)


@pytest.mark.parametrize(("changed", "says"), MISUSES, ids=[says for _, says in MISUSES])
def test_a_wrong_launch_is_one_line_and_writes_nothing(
    changed: dict[str, str], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, value in {**PAIR, "RANK": "0", **changed}.items():
        monkeypatch.setenv(name, value)
    shown = fmg("train", "--device", "cpu")
    assert shown.code == 2
    assert shown.stderr.count("\n") == 1
    assert says in shown.stderr
    assert not list(tmp_path.iterdir())


def test_an_error_of_all_processes_is_reported_by_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {**PAIR, "WORLD_SIZE": "1000"}.items():
        monkeypatch.setenv(name, value)
    shown = fmg("train", "--device", "cpu")
    assert (shown.code, shown.stdout, shown.stderr) == (2, "", "")


def test_the_engine_is_the_recipes_or_what_accelerate_was_configured_for() -> None:
    automatic, ddp, fsdp2 = (Recipe.default(None, **{"train.parallel": x}) for x in ("auto", "ddp", "fsdp2"))
    assert [choose_engine(recipe, {}) for recipe in (automatic, ddp, fsdp2)] == ["ddp", "ddp", "fsdp2"]
    assert [choose_engine(recipe, FSDP2) for recipe in (automatic, fsdp2)] == ["fsdp2", "fsdp2"]
    with pytest.raises(UsageError, match="but the recipe says"):
        choose_engine(ddp, FSDP2)


def test_each_process_takes_the_device_of_its_place() -> None:
    cuda, second = (Recipe.default(None, **{"train.device": x}) for x in ("cuda", "cuda:1"))
    assert (device_of(cuda, Launch(5, 8, 1, 4), 4), device_of(second, Launch(), 4)) == ("cuda:1", "cuda:1")
    auto = Recipe.default(None, **{"train.device": "auto"})
    assert [device_of(auto, Launch(5, 8, 1), gpus) for gpus in (4, 0)] == ["cuda:1", "auto"]
    assert device_of(auto, Launch(), 4) == "auto"
    with pytest.raises(UsageError, match=r"At least 4 processes were started on this machine, but torch sees 1 GPU"):
        device_of(auto, Launch(0, 4, 0, 4), 1)
    with pytest.raises(UsageError, match="a single device, 'cuda:1', for 2 processes"):
        device_of(second, Launch(0, 2, 0), 4)


@pytest.mark.parametrize(("kind", "most", "what"), [("chain", 8, "samples"), ("branch", 2, "groups")])
def test_there_may_be_as_many_processes_as_samples_or_groups(kind: str, most: int, what: str) -> None:
    recipe = Recipe.default(None, **{"rollout.kind": kind, "rollout.groups": 2, "rollout.group_size": 4})
    check_shares(recipe, most, "fsdp2")
    with pytest.raises(UsageError, match=f"{most + 1} processes cannot share the {most} {what}"):
        check_shares(recipe, most + 1, "ddp")


def test_nothing_of_a_full_fine_tune_can_be_spread() -> None:
    recipe = Recipe.default(None, **{"train.trainable": "full"})
    check_shares(recipe, 2, "ddp")
    check_shares(recipe, 1, "fsdp2")
    with pytest.raises(UsageError, match="leaves nothing frozen"):
        check_shares(recipe, 2, "fsdp2")


def test_a_small_model_takes_a_whole_rollout_on_a_gpu_and_a_large_one_does_not() -> None:
    small, large = Recipe.default(None), Recipe.default("meanflow-flux")
    assert choose_sizes(small, "cuda") == Sizes(384, 384)
    assert choose_sizes(small, "cpu") == Sizes(96, 96)
    assert choose_sizes(large.with_({"train.micro_batch": None, "rollout.batch_size": None}), "cuda") == Sizes(16, 16)


@pytest.mark.parametrize(("processes", "rows"), [(2, 192), (3, 128), (8, 48)])
def test_every_process_has_a_shard_of_what_a_small_model_generates(processes: int, rows: int) -> None:
    sizes = choose_sizes(Recipe.default(None), "cuda", processes)
    assert sizes == Sizes(rows, rows)
    assert all(Shard(384, rank, processes, sizes.rollout_batch).length > 0 for rank in range(processes))


@pytest.mark.parametrize(("groups", "processes"), [(72, 2), (100, 3), (144, 4)])
def test_shards_of_more_than_one_call_are_equal_calls(groups: int, processes: int) -> None:
    sizes = choose_sizes(Recipe.default(None, **{"rollout.groups": groups}), "cuda", processes)
    own = [Shard(16 * groups, rank, processes, sizes.rollout_batch).length for rank in range(processes)]
    assert max(own) - min(own) <= processes
    assert sizes.rollout_batch <= 512


def test_bf16_calls_which_are_padded_stay_small() -> None:
    assert choose_sizes(Recipe.default(None, **{"train.dtype": "bf16"}), "cuda") == Sizes(16, 16)


def test_what_the_recipe_states_is_taken() -> None:
    stated = Recipe.default(None, **{"rollout.batch_size": 24, "train.micro_batch": 7})
    assert choose_sizes(stated, "cuda") == Sizes(24, 7)
