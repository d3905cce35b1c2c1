"""Hands a model that was read in shares to ZeRO-3, which keeps each share where it is.

    files --models.placement--> this rank's share of each parameter --partition--> DeepSpeed's `ds_tensor`

DeepSpeed divides parameters as we do: of n ranks the r-th has the r-th n-th of the flattened one, padded at its end.
Its own `deepspeed.zero.Init` needs every parameter whole once, on the device, and sends it from the first rank to all.
Private parts of 0.19 that this module uses: deepspeed/runtime/zero/partition_parameters.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import deepspeed
import torch
from torch import Tensor, nn

from models.common.documents import read_json
from models.placement import Division, Placement, Share, set_share, share_numel, share_of
from trainer.config.schema import DS_CONFIGS, EngineConfig
from trainer.distributed.context import DistributedContext


def placement_for(config: EngineConfig, device: torch.device, ranks: DistributedContext) -> Placement:
    """Where a stage's pretrained weights are read to: the device, or under ZeRO-3 each rank's share alone."""
    zero = read_json(DS_CONFIGS, f"{config.zero}.json")["zero_optimization"]
    if zero["stage"] < 3:
        return Placement(device)
    kept_on = torch.device("cpu") if "offload_param" in zero else device
    return Placement(device, Division(ranks.rank, ranks.world_size, kept_on, _gather))


def _gather(values: Tensor) -> Tensor:
    """A vector of each rank, end to end. A collective call of all ranks."""
    world_size = torch.distributed.get_world_size()
    found = torch.empty(world_size * len(values), dtype=values.dtype, device=values.device)
    deepspeed.comm.all_gather_into_tensor(found.view(torch.uint8), values.view(torch.uint8))
    return found


def hand_over(module: nn.Module, settings: Mapping[str, Any]) -> None:
    """Make partitioned parameters of DeepSpeed of the divided ones, one after the other; the others stay as they are.

    Args:
        settings: what `deepspeed.initialize` will get.
    """
    divided = [parameter for parameter in module.parameters() if share_of(parameter) is not None]
    if not divided:
        return
    # deepspeed.initialize converts the other parameters with the same object (zero/parameter_offload.py,
    # _convert_to_zero_parameters), so it is made with the same values.
    init = deepspeed.zero.Init(module=nn.Module(), dtype=torch.float32, config_dict_or_path=dict(settings))
    for parameter in divided:
        share = share_of(parameter)
        assert share is not None
        _hand_over(parameter, share, init)


def _hand_over(parameter: nn.Parameter, share: Share, init: Any) -> None:
    parameter.data = torch.empty(parameter.shape, dtype=share.values.dtype, device=init.local_device)
    init._convert_to_deepspeed_param(parameter)  # it now has ds_shape and a method `partition`
    partitioned: Any = parameter
    partitioned.partition()
    kept: Tensor = partitioned.ds_tensor
    assert len(kept) == share_numel(partitioned.ds_numel, share.division.world_size)
    assert partitioned.ds_zero_partition_rank == share.division.rank
    kept.zero_()  # the padding, which would be whatever lay in memory
    kept[: len(share.values)].copy_(share.values)
    share.values.data = kept[: len(share.values)]  # who holds the share for checkpoints holds this memory
    set_share(parameter, None)
