"""Policy: how large the rank budget is at each step, and what happens to importance and masks then."""

from adalora_kernels.allocator.adamw import AdaLoraAdamW
from adalora_kernels.allocator.allocator import RankAllocator
from adalora_kernels.allocator.attach import Attachment
from adalora_kernels.allocator.engine import BudgetEngine, Turn
from adalora_kernels.allocator.graphed import GraphedStep, graphed_step
from adalora_kernels.allocator.orthogonality import compute_orth_regu
from adalora_kernels.allocator.schedule import BudgetSchedule, StepPlan
from adalora_kernels.allocator.triplets import Triplet, find_triplets

__all__ = [
    "AdaLoraAdamW",
    "Attachment",
    "BudgetEngine",
    "BudgetSchedule",
    "GraphedStep",
    "RankAllocator",
    "StepPlan",
    "Triplet",
    "Turn",
    "compute_orth_regu",
    "find_triplets",
    "graphed_step",
]
