"""Released weight formats: one reader a layout, a restricted unpickler, renaming rules, a loader and a writer.

- `layouts.detect(path)` names the layout, `hub.resolve(name)` turns a hub id into a local folder first
- `hf.read(path)` gives a lazy `TensorMap`; `loading.load_into` streams it into a network that stands on the meta device
- `sat`, `lavis`, `mindspore`, `deepspeed` read the other layouts under their own names, ranks and shards put together
- `writer.save_sharded(tensors, folder)` writes the HF layout back; `output.write_plan` any layout, tensor by tensor

Nothing here runs a checkpoint's code, imports one of its `.py` files or unpickles more than plain data and tensors.
"""
