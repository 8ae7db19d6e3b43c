"""The methods that are one pass over the tensors. A new one is one file here and one line below."""

from __future__ import annotations

from adarank.methods.arcee_fusion import ArceeFusion
from adarank.methods.average import WeightAverage
from adarank.methods.base import Method, merge_tensor, merge_tensors
from adarank.methods.breadcrumbs import Breadcrumbs
from adarank.methods.breadcrumbs_ties import BreadcrumbsTies
from adarank.methods.cart import CART
from adarank.methods.cart_indexing import CARTIndexing
from adarank.methods.consensus_ta import ConsensusTA
from adarank.methods.consensus_ties import ConsensusTies
from adarank.methods.dare import Dare
from adarank.methods.dare_linear import DareLinear
from adarank.methods.dare_ties import DareTies
from adarank.methods.dare_ties_merging import DareTiesMerging
from adarank.methods.della import Della
from adarank.methods.della_linear import DellaLinear
from adarank.methods.emr import EMR
from adarank.methods.fisher import Fisher
from adarank.methods.informed import Informed
from adarank.methods.iso_c import IsoC
from adarank.methods.iso_cts import IsoCTS
from adarank.methods.karcher import Karcher
from adarank.methods.linear import Linear
from adarank.methods.masked import Masked
from adarank.methods.model_stock import ModelStock
from adarank.methods.multislerp import MultiSlerp
from adarank.methods.nearswap import NearSwap
from adarank.methods.nuslerp import NuSlerp
from adarank.methods.ram import RAM
from adarank.methods.ramplus_tl import RAMPlus
from adarank.methods.regmean import RegMean
from adarank.methods.regmean_plus_plus import RegMeanPlusPlus
from adarank.methods.sce import SCE
from adarank.methods.slerp import Slerp
from adarank.methods.star import STAR
from adarank.methods.svd_k import SVDk
from adarank.methods.tall_masks import TallMasks
from adarank.methods.task_arithmetic import TaskArithmetic
from adarank.methods.ties import Ties
from adarank.methods.ties_merging import TiesMerging
from adarank.methods.tsv_c import TSVC
from adarank.methods.tsv_m import TSVM

ALL: tuple[type[Method], ...] = (
    WeightAverage,
    Linear,
    Slerp,
    NuSlerp,
    MultiSlerp,
    Karcher,
    NearSwap,
    ArceeFusion,
    ModelStock,
    TaskArithmetic,
    Ties,
    DareLinear,
    DareTies,
    Breadcrumbs,
    BreadcrumbsTies,
    DellaLinear,
    Della,
    SCE,
    RAM,
    RAMPlus,
    TiesMerging,
    Dare,
    DareTiesMerging,
    ConsensusTA,
    ConsensusTies,
    SVDk,
    STAR,
    TSVM,
    IsoC,
    IsoCTS,
    CART,
    Fisher,
    RegMean,
    RegMeanPlusPlus,
    Masked,
    TallMasks,
    EMR,
    TSVC,
    CARTIndexing,
)
METHODS: dict[str, type[Method]] = {method.name: method for method in ALL}

__all__ = [
    "CART",
    "METHODS",
    "Fisher",
    "Informed",
    "Masked",
    "Method",
    "RegMean",
    "RegMeanPlusPlus",
    "SVDk",
    "TaskArithmetic",
    "WeightAverage",
    "merge_tensor",
    "merge_tensors",
]
