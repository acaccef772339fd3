"""Many processes: what is summed over ranks, and what wrappers keep back from ``p.grad``.

========================  ==============================================================================================
``ranks``                 from a DTensor to its local shard, and the one all-reduce of a step
``wrappers``              what is asked when a phase begins and ends; it joins the four below
``data_parallel``         DistributedDataParallel: has it reduced?
``fsdp1``                 FullyShardedDataParallel: which parameters are shards of it, has it reduced?
``fsdp2``                 fully_shard: the gradients that it holds back
``engines``               DeepSpeed: refused, for it keeps the gradients
========================  ==============================================================================================
"""
