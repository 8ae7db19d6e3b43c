"""The methods that are one pass over the tensors. A new one is one file in a folder beside this file and one line below."""

from __future__ import annotations

from adarank.methods.base import Method, merge_tensor, merge_tensors
from adarank.methods.calibrated.base import CalibratedMethod
from adarank.methods.calibrated.esm import ESM
from adarank.methods.calibrated.featcal import FeatCal
from adarank.methods.calibrated.fisher import Fisher
from adarank.methods.calibrated.regmean import RegMean
from adarank.methods.calibrated.regmean_plus_plus import RegMeanPlusPlus
from adarank.methods.linear.average import WeightAverage
from adarank.methods.linear.karcher import Karcher
from adarank.methods.linear.linear import Linear
from adarank.methods.linear.model_stock import ModelStock
from adarank.methods.linear.multislerp import MultiSlerp
from adarank.methods.linear.nearswap import NearSwap
from adarank.methods.linear.nuslerp import NuSlerp
from adarank.methods.linear.passthrough import Passthrough
from adarank.methods.linear.slerp import Slerp
from adarank.methods.linear.task_arithmetic import TaskArithmetic
from adarank.methods.sparse.arcee_fusion import ArceeFusion
from adarank.methods.sparse.breadcrumbs import Breadcrumbs
from adarank.methods.sparse.breadcrumbs_ties import BreadcrumbsTies
from adarank.methods.sparse.consensus_ta import ConsensusTA
from adarank.methods.sparse.consensus_ties import ConsensusTies
from adarank.methods.sparse.dare import Dare
from adarank.methods.sparse.dare_linear import DareLinear
from adarank.methods.sparse.dare_ties import DareTies
from adarank.methods.sparse.dare_ties_merging import DareTiesMerging
from adarank.methods.sparse.della import Della
from adarank.methods.sparse.della_linear import DellaLinear
from adarank.methods.sparse.ram import RAM
from adarank.methods.sparse.ramplus_tl import RAMPlus
from adarank.methods.sparse.sce import SCE
from adarank.methods.sparse.ties import Ties
from adarank.methods.sparse.ties_merging import TiesMerging
from adarank.methods.spectral.cart import CART
from adarank.methods.spectral.dc_merge import DCMerge
from adarank.methods.spectral.iso_c import IsoC
from adarank.methods.spectral.iso_cts import IsoCTS
from adarank.methods.spectral.masked import Masked
from adarank.methods.spectral.star import STAR
from adarank.methods.spectral.svc import SVC
from adarank.methods.spectral.svd_k import SVDk
from adarank.methods.spectral.tsv_m import TSVM
from adarank.methods.spectral.wudi import SWUDI, WUDI, ACTMat
from adarank.methods.task_aware.cart_indexing import CARTIndexing
from adarank.methods.task_aware.emr import EMR
from adarank.methods.task_aware.tall_masks import TallMasks
from adarank.methods.task_aware.tsv_c import TSVC

ALL: tuple[type[Method], ...] = (
    WeightAverage,
    Linear,
    Passthrough,
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
    DCMerge,
    SVC,
    CART,
    WUDI,
    SWUDI,
    ACTMat,
    Fisher,
    RegMean,
    RegMeanPlusPlus,
    FeatCal,
    ESM,
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
    "CalibratedMethod",
    "Fisher",
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
