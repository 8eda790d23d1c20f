"""Tiny random models, batches for them, and the DeepSpeed configurations that tests run under."""

from __future__ import annotations

import os
import resource
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar

# Tests have tiny tensors: two OpenMP threads would mostly wait for each other. Those of threads ask for more.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
import torch.distributed
from hypothesis import settings
from torch import Tensor, nn

from zo_ds.errors import ZODSError
from zo_ds.parallel.channel import Channel, Seat
from zo_ds.parallel.tcp import TCPChannel

# Before anything imports deepspeed: it would look for accelerators once, at import.
os.environ.setdefault("DS_ACCELERATOR", "cpu")
settings.register_profile("shared-machine", deadline=None)
settings.load_profile("shared-machine")

Result = TypeVar("Result")
VOCABULARY = 40
STORES: dict[str, dict[str, Any]] = {
    "resident": {"stage": 0},
    "zero3": {"stage": 3},
    "zero3-cpu": {"stage": 3, "offload_param": {"device": "cpu"}},
}


def pytest_sessionfinish() -> None:
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """For small tensors: on a busy machine threads mostly wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def tiny_llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=16,
            tie_word_embeddings=True,
        )
    )


def tiny_opt() -> nn.Module:
    """Like OPT-350M: embeddings narrower than the model, layer norms after the blocks."""
    from transformers import OPTConfig, OPTForCausalLM

    return OPTForCausalLM(
        OPTConfig(
            vocab_size=VOCABULARY,
            hidden_size=16,
            word_embed_proj_dim=8,
            do_layer_norm_before=False,
            ffn_dim=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=16,
        )
    )


def tiny_bert() -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    return BertForSequenceClassification(
        BertConfig(
            vocab_size=VOCABULARY,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=16,
            num_labels=3,
        )
    )


def tiny_gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCABULARY, n_embd=16, n_layer=2, n_head=2, n_positions=16, bos_token_id=1, eos_token_id=2
        )
    )


FAMILIES: dict[str, Callable[[], nn.Module]] = {
    "llama": tiny_llama,
    "opt": tiny_opt,
    "bert": tiny_bert,
    "gpt2": tiny_gpt2,
}


def tiny_model(family: str, seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The same random weights for the same seed; every matrix and vector differs from zero and one."""
    torch.manual_seed(seed)
    model = FAMILIES[family]()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.to(dtype)


def zo_batch(family: str = "llama", examples: int = 4, seed: int = 0) -> dict[str, Tensor]:
    """Inputs with labels, the second half of them padded."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY, (examples, 8), generator=generator)
    mask = torch.ones_like(ids)
    mask[examples // 2 :, 6:] = 0
    if family == "bert":
        labels = torch.randint(0, 3, (examples,), generator=generator)
    else:
        labels = ids.masked_fill(mask == 0, -100)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def weights_of(engine: Any) -> dict[str, Tensor]:
    """A copy of every weight and buffer that an engine holds, by name."""
    return {name: tensor.clone() for name, tensor in engine.store.views()}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def join(rank: int, ranks: int, port: int, timeout_s: float = 30.0) -> TCPChannel:
    return TCPChannel(Seat(rank, ranks, rank, ranks, "127.0.0.1", port, serve=rank == 0), timeout_s)


def on_ranks(ranks: int, work: Callable[[Channel], Result], timeout_s: float = 30.0) -> list[Result | ZODSError]:
    """Run the same work on every rank of a new group; what it returned or raised, in rank order."""
    port = free_port()

    def run(rank: int) -> Result | ZODSError:
        try:
            return work(join(rank, ranks, port, timeout_s))
        except ZODSError as error:
            return error

    with ThreadPoolExecutor(ranks) as pool:
        return list(pool.map(run, range(ranks)))


@contextmanager
def small_files(limit: int) -> Iterator[None]:
    """No file may grow beyond so many bytes, in the whole process: a disk that fills up."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
