"""The configurations that ``truth`` measures and predicts, by their number of processes. Calibration uses none."""

_WIDE = ["model.layers=4", "model.hidden=512", "model.heads=8", "model.ffn=2048", "model.sequence_length=256"]
_WIDE += ["model.vocab_size=2048", "moe.num_experts=8", "data.batch_size=8", "data.micro_batch_size=1"]
_WIDE += ["comm.ledger.time=true"]  # a GPU would wait for each of its collectives
_NARROW = [*_WIDE, "model.hidden=384", "model.heads=6", "model.ffn=1536"]
_DENSE = ["moe.num_experts=0"]
_WIDER = [*_WIDE, "model.layers=2", "model.hidden=768", "model.heads=12", "model.ffn=3072"]
CPU: dict[int, dict[str, list[str]]] = {
    1: {
        "one process": [*_WIDE, "parallel=single", "data.batch_size=4", "data.micro_batch_size=4"],
        "… recomputing": [*_WIDE, "parallel=single", "data.batch_size=4", "model.recompute.granularity=block"],
        "… narrower, 4 micro-batches": [*_NARROW, "parallel=single", "data.batch_size=4"],
    },
    2: {
        "tensor 2": [*_WIDE, "parallel=tp2", "data.micro_batch_size=4"],
        "expert 2, recomputing": [
            *_WIDE,
            "parallel=ep2",
            "model.recompute.granularity=block",
            "data.micro_batch_size=4",
        ],
        "data 2, dense, wider": [*_WIDER, "parallel=dp2", *_DENSE, "data.micro_batch_size=4"],
        "sequence 2, narrower": [*_NARROW, "parallel=tp2", "parallel.sequence=true", "data.micro_batch_size=4"],
    },
    4: {
        "tensor 2 × expert 2": [*_WIDE, "parallel=tp2_ep2", "data.micro_batch_size=4"],
        "… DTD, CAC, recomputing": [*_WIDE, "parallel=tp2_ep2", "comm=ted", "model.recompute.granularity=block"],
        "tensor 4, wider": [*_WIDER, "parallel=tp4", "data.micro_batch_size=4"],
        "expert 4, top-2": [*_NARROW, "parallel=ep4", "moe.top_k=2", "data.micro_batch_size=2"],
    },
    8: {
        "tensor 2 × expert 4, DTD": [*_WIDE, "parallel=tp2_ep4", "comm=dtd", "data.micro_batch_size=2"],
        "tensor 4 × expert 2, wider": [*_WIDER, "parallel=tp4_ep2", "data.micro_batch_size=4"],
        "2 × 2 × 2, DTD, CAC, recomputing": [
            *_WIDE,
            "parallel=tp2_ep2_dp2",
            "comm=ted",
            "model.recompute.granularity=block",
        ],
    },
}

_GPU = ["trainer=gpu", "parallel=single", "model=gpt_1.3b", "model.vocab_size=50304", "moe=dense"]
_GPU += ["optim.tile=1800000"]
_RANK = ["trainer=gpu", "parallel.world_size=128", "parallel.tensor=4", "parallel.expert=16", "moe=paper16"]
_RANK += ["comm=ted", "model.recompute.granularity=block", "trainer.precision=bf16-true", "model.vocab_size=50304"]
_RANK += ["data.batch_size=32", "data.micro_batch_size=1", "optim.tile=1800000"]
_OLMOE = ["trainer=gpu", "parallel=single", "model=olmoe_1b_7b", "moe=olmoe", "model.layers=2", "model.vocab_size=8192"]
_OLMOE += ["trainer.precision=bf16-true", "optim.tile=fused", "data.batch_size=4", "data.micro_batch_size=4"]
_OLMOE_2 = [*_OLMOE, "parallel=ep2", "data.batch_size=8"]
_TENSOR_2 = [*_GPU, "model.layers=4", "parallel=tp2", "trainer.precision=bf16-true", "optim.tile=fused"]
_TENSOR_2 += ["data.batch_size=8", "data.micro_batch_size=8"]
_EXPERTS = ["moe=top1", "moe.num_experts=8"]
_OLMOE_4 = [*_OLMOE, "parallel=ep4", "data.batch_size=16"]
_FOLDED_4 = ["parallel=tp4", "parallel.expert=4", "parallel.expert_tensor=1", "data.batch_size=4"]
_PAPERS_4 = [*_GPU, *_EXPERTS, "model.layers=4", "parallel=tp2_ep2", "trainer.precision=bf16-true", "optim.tile=fused"]
_PAPERS_4 += ["data.batch_size=16", "data.micro_batch_size=8"]
_ZIPF = "moe.gating=zipf"  # of benchmarks.skewed
_COMPILED = "model.compile=inductor"
_RECOMPUTING = "model.recompute.granularity=block"
CUDA: dict[int, dict[str, list[str]]] = {
    1: {
        "1.3B's width, 4 layers, bf16-true": [
            *_GPU,
            "model.layers=4",
            "trainer.precision=bf16-true",
            "data.batch_size=4",
            "data.micro_batch_size=4",
        ],
        "… bf16-mixed, 8 layers, 2 micro-batches": [
            *_GPU,
            "model.layers=8",
            "trainer.precision=bf16-mixed",
            "data.batch_size=4",
            "data.micro_batch_size=2",
        ],
        "… 4 layers, 8 experts, recomputing, bf16-true": [
            *_GPU,
            "model.layers=4",
            "moe=top1",
            "moe.num_experts=8",
            "model.recompute.granularity=block",
            "trainer.precision=bf16-true",
            "data.batch_size=8",
            "data.micro_batch_size=8",
        ],
        "6.7B's width, 2 layers, bf16-true": [
            *_GPU,
            "model=gpt_6.7b",
            "model.layers=2",
            "trainer.precision=bf16-true",
            "data.batch_size=4",
            "data.micro_batch_size=2",
        ],
        "OLMoE's width, 2 layers, dropless": _OLMOE,
        "… recomputing, bf16-mixed, 2 micro-batches": [
            *_OLMOE,
            _RECOMPUTING,
            "trainer.precision=bf16-mixed",
            "data.micro_batch_size=2",
        ],
        "… compiled": [*_OLMOE, _COMPILED],
    },
    2: {
        "OLMoE's width, 2 layers, expert 2": _OLMOE_2,
        "… tokens sent once": [*_OLMOE_2, "comm.dedup=rank"],
        "… skewed": [*_OLMOE_2, _ZIPF],
        "… 2 chunks": [*_OLMOE_2, "comm.chunks=2"],
        "… recomputing": [*_OLMOE_2, _RECOMPUTING],
        "… recomputing, CAC, bf16-mixed, 2 micro-batches": [
            *_OLMOE_2,
            _RECOMPUTING,
            "comm=cac",
            "trainer.precision=bf16-mixed",
            "data.micro_batch_size=2",
        ],
        "… tensor 2": [*_OLMOE_2, "parallel=tp2"],
        "… tensor 2, sequence": [*_OLMOE_2, "parallel=tp2", "parallel.sequence=true"],
        "… tensor 2 × expert 2, folded": [*_OLMOE_2, "parallel=tp2", "parallel.expert=2", "parallel.expert_tensor=1"],
        "1.3B's width, 4 layers, 8 experts with capacity, expert 2": [
            *_TENSOR_2,
            *_EXPERTS,
            "parallel=ep2",
            "data.batch_size=16",
        ],
        "… tensor 2 × expert 2, folded, DTD, CAC, recomputing": [
            *_TENSOR_2,
            *_EXPERTS,
            "parallel.expert=2",
            "parallel.expert_tensor=1",
            _RECOMPUTING,
            "comm=ted",
        ],
        "… dense, tensor 2": [*_TENSOR_2, "optim.tile=1800000"],
        "… dense, data 2, overlapped, 2 micro-batches": [
            *_TENSOR_2,
            "parallel=dp2",
            "optim.overlap=true",
            "data.batch_size=16",
            "data.micro_batch_size=4",
        ],
        "… dense, tensor 2, sequence, compiled": [*_TENSOR_2, "parallel.sequence=true", _COMPILED],
        "OLMoE's width, 2 layers, expert 2, compiled": [*_OLMOE_2, _COMPILED],
        "… compiled, tokens sent once": [*_OLMOE_2, _COMPILED, "comm.dedup=rank"],
    },
    4: {
        "OLMoE's width, 2 layers, expert 4": _OLMOE_4,
        "… tokens sent once": [*_OLMOE_4, "comm.dedup=rank"],
        "… all tokens gathered": [*_OLMOE_4, "comm.dedup=group"],
        "… skewed": [*_OLMOE_4, _ZIPF],
        "… skewed, experts lent": [*_OLMOE_4, _ZIPF, "moe.lend.policy=llep"],
        "… tensor 2 × expert 2": [*_OLMOE_4, "parallel=tp2_ep2", "data.batch_size=8"],
        "… tensor 4 × expert 4, folded": [*_OLMOE_4, *_FOLDED_4],
        "1.3B's width, 4 layers, 8 experts with capacity, tensor 2 × expert 2": _PAPERS_4,
        "… DTD": [*_PAPERS_4, "comm=dtd"],
        "… recomputing": [*_PAPERS_4, _RECOMPUTING],
        "… recomputing, CAC": [*_PAPERS_4, _RECOMPUTING, "comm=cac"],
        "… recomputing, DTD, CAC": [*_PAPERS_4, _RECOMPUTING, "comm=ted"],
        "… recomputing, fused reduce-scatter, CAC": [*_PAPERS_4, _RECOMPUTING, "comm=ted_fused"],
    },
}
CUDA_MEMORY = {
    "6.7B × 16 experts, one rank of 128": [*_RANK, "model=gpt_6.7b"],
    "2.7B × 16 experts, one rank of 128, DTD": [*_RANK, "model=gpt_2.7b", "comm=dtd"],
    "1.3B's width, 8 layers, one process": [
        *_GPU,
        "model.layers=8",
        "trainer.precision=bf16-true",
        "data.batch_size=2",
        "data.micro_batch_size=2",
    ],
}
CPU_MEMORY = {
    "one process, 8 experts": [*_WIDE, "parallel=single", "data.batch_size=4", "data.micro_batch_size=4"],
    "one rank of 128, DTD, CAC, recomputing": [
        *_WIDE,
        "parallel.world_size=128",
        "parallel.tensor=4",
        "parallel.expert=16",
        "moe.num_experts=16",
        "data.batch_size=128",
        "data.micro_batch_size=4",
        "comm=ted",
        "model.recompute.granularity=block",
    ],
}

# Added to any of these, it becomes one that a CPU computes within a second.
TINY = ["trainer=cpu", "model.hidden=64", "model.heads=4", "model.ffn=32", "model.sequence_length=32"]
TINY += ["model.vocab_size=256", "optim.tile=null"]
