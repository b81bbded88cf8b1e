import torch

from pipeline.streaming.buffers import Buffers


def test_a_buffer_is_used_again_only_when_no_tensor_shares_it():
    buffers = Buffers()
    first = buffers.take((2, 3))
    address = first.data_ptr()
    second = buffers.take((2, 3))
    assert second.data_ptr() != address
    view = first[:1].permute(1, 0)
    del first
    assert buffers.take((2, 3)).data_ptr() != address  # a view of it is alive
    weight = torch.ones(1, requires_grad=True)
    loss = (view * weight).sum()
    del view
    assert buffers.take((2, 3)).data_ptr() != address  # autograd keeps it for the backward pass
    loss.backward()
    del loss
    assert buffers.take((3, 2)).data_ptr() == address


def test_a_kept_batch_never_changes(train):
    import itertools

    import numpy as np

    from pipeline.streaming.config import AugmentConfig, LoaderConfig
    from pipeline.streaming.loader import Loader
    from pipeline.streaming.transforms import train_views

    views = train_views((16, 16), AugmentConfig(), (0.5,) * 3, (0.5,) * 3)
    config = LoaderConfig(virtual_readers=2, workers=0)
    options = {"global_batch": 8, "rank": 0, "world_size": 1, "seed": 0, "views": views, "config": config}
    loader = Loader(train, np.arange(100), **options)
    kept, copies = [], []
    for batch in itertools.islice(loader.batches(), 20):
        kept.append(batch)
        copies.append(batch.images.clone())
    assert all(torch.equal(batch.images, copy) for batch, copy in zip(kept, copies, strict=True))
