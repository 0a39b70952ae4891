custom_imports = dict(imports=["neftune"])
custom_hooks = [dict(type="NEFTuneHook", noise_alpha=5)]
model = dict(type="CausalLM", pretrained="Qwen/Qwen2.5-0.5B")
train_dataloader = dict(
    batch_size=4,
    sampler=dict(type="DefaultSampler", shuffle=True),
    dataset=dict(type="Texts", file="train.jsonl", pretrained="Qwen/Qwen2.5-0.5B"),
    collate_fn=dict(type="padded"),
)
train_cfg = dict(by_epoch=True, max_epochs=1)
optim_wrapper = dict(optimizer=dict(type="AdamW", lr=2e-5))
work_dir = "out"
