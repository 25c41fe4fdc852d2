"""The kinds of input that are changed at random, and what must hold of a command that succeeds."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import random
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mutate
import plugin_sources
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
import zstandard
from processes import Ended, ForkServer
from safetensors.torch import load_file

from tokenyard_train.checkpoint.manifest import find_fault_alone

Verdict = str | None
"""What is wrong with a state that a command left behind; None if nothing."""

_MODEL = {
    "name": "dbrx",
    "size": "tiny",
    "d_model": 16,
    "n_heads": 2,
    "attn_config": {"kv_n_heads": 1, "clip_qkv": 8.0, "rope_theta": 10000.0},
    "ffn_config": {
        "ffn_hidden_size": 16,
        "moe_num_experts": 4,
        "moe_top_k": 2,
        "moe_loss_weight": 0.05,
    },
}
_SMALL = {
    "seed": 17,
    "device": "cpu",
    "max_seq_len": 16,
    "global_train_batch_size": 4,
    "max_duration": "4ba",
    "save_interval": "2ba",
    "save_folder": "run",
    "scheduler": {"t_max": "8ba"},
    "model": _MODEL,
    "train_loader": {"name": "text", "dataset": {"path": "text.txt"}},
}
_GENERATE = ("--prompt", "12", "--max-new-tokens", "3", "--temperature", "0")


class Kind:
    """Makes an input once, and then cases: a copy of the input with something changed."""

    def __init__(self, server: ForkServer, base: Path):
        self.server = server
        self.base = base
        base.mkdir()
        (base / "text.txt").write_text(" ".join(map(str, range(900))))
        (base / "c.yaml").write_text(yaml.safe_dump(_SMALL, sort_keys=False))
        self.prepare()

    def prepare(self) -> None:
        """Write the input, and run the commands on it as it is."""

    def run(self, draw: random.Random, folder: Path) -> tuple[str, Ended, Verdict]:
        """Run one case in a copy of the input; return what was changed and how it ended."""
        raise NotImplementedError

    def copy(self, folder: Path) -> None:
        """Copy the input into a folder."""
        shutil.copytree(self.base, folder, dirs_exist_ok=True, symlinks=True)

    def reference(self, *commands: tuple[str, ...]) -> Ended:
        """Run commands, which must succeed, on the input itself."""
        ended = self.server.run(self.base, commands)
        assert ended.succeeded, (ended, ended.errors())
        return ended


class Configs(Kind):
    """YAML: types, values, missing, doubled and nested keys, huge numbers, anchors, encodings."""

    bases: dict[str, Any] = {
        "dbrx": _SMALL
        | {
            "run_name": "fuzz",
            "variables": {"length": 16, "data": "text.txt"},
            "max_seq_len": "${variables.length}",
            "tokenizer": {"name": "bytes"},
            "train_loader": {
                "name": "text",
                "dataset": {"path": "${variables.data}", "shuffle": True},
            },
            "eval_loader": {"name": "text", "dataset": {"path": ["text.txt"]}},
            "eval_interval": "1ba",
            "eval_subset_num_batches": 2,
            "device_train_microbatch_size": 2,
            "optimizer": {"name": "adamw", "lr": 1e-3, "betas": [0.9, 0.95], "eps": 1e-8},
            "algorithms": {"gradient_clipping": {"clipping_threshold": 1.0}},
            "callbacks": {"generate_callback": {"prompts": ["12"], "max_new_tokens": 2}},
            "backends": {"experts": "torch", "router": {"name": "torch"}},
            "parallel": {"strategy": "single"},
            "precision": "amp_bf16",
            "save_num_checkpoints_to_keep": 2,
        },
        "mixtral": _SMALL
        | {
            "model": {
                "name": "mixtral",
                "size": "tiny",
                "hidden_size": 16,
                "intermediate_size": 16,
                "num_attention_heads": 2,
                "num_key_value_heads": 1,
                "num_local_experts": 4,
                "vocab_size": 300,
            },
            "scheduler": {"name": "linear_decay_with_warmup", "t_warmup": "1ba", "t_max": "1dur"},
            "train_loader": {
                "name": "text",
                "dataset": {
                    "streams": {
                        "a": {"path": "text.txt", "proportion": 0.7},
                        "b": {"path": ["text.txt"], "proportion": 0.3},
                    }
                },
            },
            "lora": {"rank": 2, "alpha": 4.0, "targets": ["up"], "train_also": ["*norm*"]},
            "nonfinite": "skip",
            "activation_checkpointing": "selective",
            "activation_cpu_offload": True,
            "save_async": True,
            "console_log_interval": "1ba",
        },
        "mpt": {
            "max_seq_len": 16,
            "global_seed": None,
            "model": {
                "name": "mpt_causal_lm",
                "d_model": 16,
                "n_heads": 2,
                "n_layers": 2,
                "expansion_ratio": 2,
                "attn_config": {"attn_impl": "flash", "alibi": False},
                "init_device": "meta",
            },
            "tokenizer": {"name": "bytes", "kwargs": {}},
            "train_loader": {
                "name": "text",
                "dataset": {"path": "text.txt", "remote": None},
                "drop_last": True,
                "num_workers": 8,
            },
            "max_duration": "1ep",
            "global_train_batch_size": 4,
            "fsdp_config": {"sharding_strategy": "FULL_SHARD"},
            "frozen": ["blocks.0.*"],
            "deterministic_mode": True,
            "device": "cpu",
            "parallel": {"strategy": {"name": "fsdp", "replicate": 1, "timeout": 600.0}},
        },
    }
    train = ("train", "c.yaml", "save_folder=run", "max_duration=2ba", "save_interval=2ba")

    def prepare(self) -> None:
        self.expected = {}
        for name, tree in self.bases.items():
            (self.base / "c.yaml").write_text(yaml.safe_dump(tree, sort_keys=False))
            self.reference(("check", "c.yaml"), self.train)
            self.expected[name] = _trained(self.base / "run")
            shutil.rmtree(self.base / "run")

    def run(self, draw: random.Random, folder: Path) -> tuple[str, Ended, Verdict]:
        self.copy(folder)
        name = draw.choice(sorted(self.bases))
        text, done = self._change(draw, self.bases[name])
        (folder / "c.yaml").write_bytes(text)
        done = f"{name}: {done}"
        ended = self.server.run(folder, [("check", "c.yaml")])
        if not ended.succeeded or _is_large(ended.output()):
            return done, ended, None
        ended = self.server.run(folder, [self.train])
        verdict = None
        if ended.succeeded:
            verdict = self._compare(_trained(folder / "run"), self.expected[name])
        return done, ended, verdict

    @staticmethod
    def _change(draw: random.Random, tree: Any) -> tuple[bytes, str]:
        if draw.random() < 0.7:
            tree, done = mutate.mutate_tree(draw, tree)
            if draw.random() < 0.2:
                tree, second = mutate.mutate_tree(draw, tree)
                done += f", {second}"
            return yaml.dump(tree, sort_keys=False, allow_unicode=True).encode(), done
        text, done = mutate.mutate_text(draw, yaml.safe_dump(tree, sort_keys=False))
        encoding = draw.choice(("utf-8",) * 8 + ("utf-16", "utf-8-sig"))
        return text.encode(encoding, "surrogatepass"), f"{done} as {encoding}"

    @staticmethod
    def _compare(got: tuple[Any, Any], expected: tuple[Any, Any]) -> Verdict:
        """A run of the same config has the same result; a change is visible in its config."""
        if got[0] == expected[0] and got[1] != expected[1]:
            return "the result differs, and its config does not"
        return None


def _is_large(table: str) -> bool:
    """Return whether the model or the batch that `check` describes takes long to train."""
    rows: dict[str, str] = {}
    for line in table.splitlines():
        name, _, value = line.strip().partition("  ")
        rows.setdefault(name, value)  # the first "parameters" are the model's, not its memory
    numbers = f"{rows.get('parameters')} {rows.get('batch')}".replace(",", "").split()
    return any(int(word) > 200_000 for word in numbers if word.isdecimal())


def _trained(run: Path) -> tuple[dict[str, Any], list[float]]:
    """Return the config in a run's newest checkpoint, and its losses."""
    newest = max(run.glob("ba*"), key=lambda path: int(path.name[2:]))
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    losses = [line["loss"] for line in lines if line["kind"] in ("train", "eval")]
    return json.loads((newest / "run.json").read_text())["config"], losses


class RunFolders(Kind):
    """Files of a run that are cut, flipped, forged, or something else than files."""

    resume = ("train", "c.yaml", "autoresume=true", "max_duration=6ba")
    start = ("train", "c.yaml", "save_folder=new", "load_path=run", "max_duration=1ba")
    generate = ("generate", "run", *_GENERATE)
    convert = ("convert", "run", "out")

    def prepare(self) -> None:
        self.reference(("train", "c.yaml"))
        self.expected: dict[Any, list[Any]] = {}
        kept = self.base / "kept"
        shutil.copytree(self.base / "run", kept)
        for newest in ("ba4", "ba2"):  # a damaged ba4 is passed over
            for command in (self.generate, self.convert, self.start):
                result = self._result(command, self.reference(command), self.base)
                self.expected.setdefault(command, []).append(result)
                for made in ("out", "new"):
                    shutil.rmtree(self.base / made, ignore_errors=True)
            shutil.rmtree(self.base / "run" / newest)
        _restore(kept, self.base / "run")
        self.expected[self.resume] = [
            self._result(self.resume, self.reference(self.resume), self.base)
        ]
        _restore(kept, self.base / "run")
        shutil.rmtree(kept)

    def run(self, draw: random.Random, folder: Path) -> tuple[str, Ended, Verdict]:
        self.copy(folder)
        run = folder / "run"
        forged = draw.random() < 0.25
        if forged:
            done = _forge(draw, run / draw.choice(("ba2", "ba4", "ba4")))
        else:
            count = draw.choice((1, 1, 2, 3))
            done = "; ".join(mutate.mutate_folder(draw, run, "ba4/*") for _ in range(count))
        good = {} if not run.is_dir() else _good(run)
        command = draw.choice((self.resume, self.resume, self.generate, self.convert, self.start))
        ended = self.server.run(folder, [command])
        done = f"{command[0]}: {done}"
        if lost := [name for name, digest in good.items() if _good(run).get(name) != digest]:
            return done, ended, f"good checkpoints were changed: {lost}"
        if not ended.succeeded or forged:
            return done, ended, None
        if self._result(command, ended, folder) not in self.expected[command]:
            return done, ended, "the result differs"
        return done, ended, None

    def _result(self, command: tuple[str, ...], ended: Ended, folder: Path) -> Any:
        """Return what a command is for: its text, or the tensors that it wrote."""
        if command == self.generate:
            return ended.output()
        if command == self.convert:
            return _tensors(folder / "out")
        written = folder / "new" / "ba1" if command == self.start else folder / "run" / "ba6"
        return _tensors(written)


def _restore(kept: Path, run: Path) -> None:
    shutil.rmtree(run, ignore_errors=True)
    shutil.copytree(kept, run)


def _good(run: Path) -> dict[str, Any]:
    """Return the tensors of every checkpoint that verifies and has its own name."""
    folders = [path for path in run.glob("ba*") if path.is_dir() and not path.is_symlink()]
    return {
        path.name: _tensors(path)
        for path in folders
        if find_fault_alone(path) is None
        and path.name == f"ba{json.loads((path / 'run.json').read_text()).get('batch')}"
    }


def _tensors(folder: Path) -> dict[str, str]:
    """Return a digest of each tensor in a folder. The order of a file's metadata varies."""
    tensors = {}
    for path in folder.glob("*.safetensors"):
        tensors |= load_file(path)
    return {
        name: f"{tuple(tensor.shape)} {hashlib.sha256(tensor.numpy()).hexdigest()}"
        for name, tensor in tensors.items()
    }


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _forge(draw: random.Random, checkpoint: Path) -> str:
    """Change run.json and sign it anew, as one who may write the folder can."""
    from tokenyard_train.checkpoint.manifest import MANIFEST, entry_of, write_manifest

    path = checkpoint / "run.json"
    content, done = mutate.mutate_tree(draw, json.loads(path.read_text()))
    path.write_text(json.dumps(content))
    files = [each for each in checkpoint.iterdir() if each.name != MANIFEST]
    write_manifest(checkpoint, {each.name: entry_of(each) for each in files})
    return f"forged {checkpoint.name}: {done}"


class HuggingFaceFolders(Kind):
    """config.json, index, headers and tokenizers that are changed or something else than files."""

    def prepare(self) -> None:
        import torch

        from tokenyard_models import Dbrx, Llama, Mixtral, to_hf

        sizes = {"size": "tiny", "vocab_size": 257}
        mixtral = {"hidden_size": 16, "intermediate_size": 16, "num_local_experts": 4}
        models = {"dbrx": Dbrx(sizes), "llama": Llama(sizes), "mixtral": Mixtral(sizes | mixtral)}
        self.reference(("train", "c.yaml", "max_duration=1ba"), ("convert", "run", "tokenizer"))
        for name, model in models.items():
            model.init_weights(1)
            shard = {"shard_bytes": 60_000} if name == "mixtral" else {}
            to_hf(
                model, self.base / name, like=self.base / "tokenizer", dtype=torch.float32, **shard
            )
        shutil.rmtree(self.base / "tokenizer")
        shutil.rmtree(self.base / "run")

    def run(self, draw: random.Random, folder: Path) -> tuple[str, Ended, Verdict]:
        self.copy(folder)
        name = draw.choice(("dbrx", "llama", "mixtral"))
        source = folder / name
        jsons = sorted(source.glob("*.json"))
        kind = draw.random()
        if kind < 0.45:
            path = draw.choice([source / "config.json", *jsons])
            content, done = mutate.mutate_tree(draw, json.loads(path.read_text()))
            path.write_text(json.dumps(content))
            done = f"{path.name}: {done}"
        elif kind < 0.65:
            done = _change_header(draw, draw.choice(sorted(source.glob("*.safetensors"))))
        else:
            done = mutate.mutate_folder(draw, source, "*.json")
        commands = self._commands(draw, name)
        ended = self.server.run(folder, commands)
        verdict = None
        if ended.succeeded and len(commands) == 3 and ended.output(0) != ended.output(2):
            verdict = "what it was converted to generates another text"
        return f"{name}: {commands[0][0]}: {done}", ended, verdict

    @staticmethod
    def _commands(draw: random.Random, name: str) -> list[tuple[str, ...]]:
        kind = draw.choice(("round", "round", "megablocks", "run", "train", "upcycle"))
        if kind == "megablocks":
            return [("convert", name, "out", "--to", "megablocks")]
        if kind == "run":
            return [("convert", name, "out", "--to", "tokenyard")]
        if kind == "train":
            start = f"load_path=hf://{name}"
            return [("train", "c.yaml", start, "model={}", "max_duration=1ba")]
        if kind == "upcycle" and name == "llama":
            return [("upcycle", name, "out", "--num-experts", "4", "--top-k", "2")]
        generate = ("generate", name, *_GENERATE)
        return [generate, ("convert", name, "out"), ("generate", "out", *_GENERATE)]


def _change_header(draw: random.Random, path: Path) -> str:
    """Change the JSON header of a safetensors file, and pack it anew."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header, done = mutate.mutate_tree(draw, json.loads(content[8 : 8 + length]))
    packed = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(packed)) + packed + content[8 + length :])
    return f"header of {path.name}: {done}"


class DataFiles(Kind):
    """Text, JSON, parquet, MDS and packed folders that are damaged or hold other values."""

    rows = [{"text": f"text {i} ü", "n": i, "meta": {"a": [i]}} for i in range(40)]
    train = (
        *(
            "train",
            "c.yaml",
            "train_loader.dataset.path=null",
            "train_loader.dataset.packed=packed",
        ),
        *("max_duration=2ba", "save_interval=2ba"),
    )
    shards = Path(__file__).parents[1] / "train" / "data" / "mds_of_streaming"

    def prepare(self) -> None:
        for name in ("text", "text-zstd", "text-gz", "ids-ndarray", "ids-bytes", "merged"):
            shutil.copytree(self.shards / name, self.base / "mds" / name)
        self.reference(("data", "pack", "packed", "text.txt", "--workers", "1"), self.train)
        self.expected = _trained(self.base / "run")[1]
        shutil.rmtree(self.base / "run")

    def run(self, draw: random.Random, folder: Path) -> tuple[str, Ended, Verdict]:
        kind = draw.choice(("packed", "packed", "mds", "mds", "rows", "rows", "bytes", "journal"))
        self.copy(folder)
        done, ended, verdict = getattr(self, f"_{kind}")(draw, folder)
        return f"{kind}: {done}", ended, verdict

    def _packed(self, draw: random.Random, folder: Path) -> tuple[str, Ended, Verdict]:
        done = _change_json_or_bytes(draw, folder / "packed", "manifest.json")
        if draw.random() < 0.4:
            return done, self.server.run(folder, [("data", "info", "packed")]), None
        if draw.random() < 0.4:
            return done, self.server.run(folder, [("data", "verify", "packed")]), None
        ended = self.server.run(folder, [self.train])
        same = not ended.succeeded or _trained(folder / "run")[1] == self.expected
        return done, ended, None if same else "it trains on something else"

    def _journal(self, draw: random.Random, folder: Path) -> tuple[str, Ended, Verdict]:
        """An unfinished packing that goes on."""
        pack = ("data", "pack", "packed", "text.txt", "--workers", "1")
        os.remove(folder / "packed" / "manifest.json")
        done = mutate.mutate_folder(draw, folder / "packed", "journal*")
        return done, *self._pack(folder, pack)

    def _change_mds(self, draw: random.Random, folder: Path) -> tuple[str, str]:
        name = draw.choice(sorted(path.name for path in (folder / "mds").iterdir()))
        return name, _change_json_or_bytes(draw, folder / "mds" / name, "index.json")

    def _mds(self, draw: random.Random, folder: Path) -> tuple[str, Ended, Verdict]:
        name, done = self._change_mds(draw, folder)
        pack = ("data", "pack", "out", f"mds/{name}", "--mds", "--workers", "1")
        return f"{name}: {done}", *self._pack(folder, pack)

    def _rows(self, draw: random.Random, folder: Path) -> tuple[str, Ended, Verdict]:
        """Rows with other values, or text that is no row."""
        rows, done = mutate.mutate_tree(draw, self.rows)
        suffix = draw.choice((".jsonl", ".json", ".jsonl.gz", ".jsonl.zst", ".parquet"))
        try:
            content = _written(rows if isinstance(rows, list) else [rows], suffix)
        except Exception:  # parquet holds rows of one type only
            content = _written(self.rows, suffix)[: draw.randrange(400)]
        return f"{suffix}: {done}", *self._pack_file(folder, content, suffix)

    def _bytes(self, draw: random.Random, folder: Path) -> tuple[str, Ended, Verdict]:
        suffixes = (".txt", ".jsonl", ".json", ".jsonl.gz", ".jsonl.zst", ".parquet", ".txt.gz")
        suffix = draw.choice(suffixes)
        content, done = mutate.mutate_bytes(draw, _written(self.rows, suffix))
        return f"{suffix}: {done}", *self._pack_file(folder, content, suffix, draw.random() < 0.15)

    def _pack_file(
        self, folder: Path, content: bytes, suffix: str, other: bool = False
    ) -> tuple[Ended, Verdict]:
        path = folder / f"source{suffix}"
        path.write_bytes(content)
        if other:
            mutate.replace_file(random.Random(len(content)), path)
        return self._pack(folder, ("data", "pack", "out", path.name, "--workers", "1"))

    def _pack(self, folder: Path, command: tuple[str, ...]) -> tuple[Ended, Verdict]:
        """Pack, and verify what was packed."""
        ended = self.server.run(folder, [command, ("data", "verify", command[2])])
        if ended.codes[:1] == [0] and not ended.succeeded:
            return ended, "what was packed does not verify"
        return ended, None


def _change_json_or_bytes(draw: random.Random, folder: Path, name: str) -> str:
    paths = sorted(folder.rglob(name))
    if draw.random() < 0.5:
        return mutate.mutate_folder(draw, folder)
    path = draw.choice(paths)
    content, done = mutate.mutate_tree(draw, json.loads(path.read_text()))
    path.write_text(json.dumps(content))
    return f"{path.relative_to(folder)}: {done}"


def _written(rows: list[Any], suffix: str) -> bytes:
    """Return rows in a format."""
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    if suffix == ".parquet":
        buffer = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(rows), buffer)
        return buffer.getvalue()
    if suffix == ".json":
        return json.dumps(rows).encode()
    if suffix.endswith(".gz"):
        return gzip.compress(lines, mtime=0)
    return zstandard.compress(lines) if suffix.endswith(".zst") else lines


class Plugins(Kind):
    """Plugins that raise, exit or offer nonsense: they cost only themselves."""

    def prepare(self) -> None:
        self.commands = [
            ("backends",),
            ("check", "c.yaml"),
            ("train", "c.yaml", "max_duration=1ba"),
        ]
        self.reference(*self.commands)
        self.expected = _trained(self.base / "run")
        shutil.rmtree(self.base / "run")

    def run(self, draw: random.Random, folder: Path) -> tuple[str, Ended, Verdict]:
        self.copy(folder)
        source = plugin_sources.draw_source(draw)
        plugin_sources.install(folder / "site", source)
        ended = self.server.run(folder, self.commands, [str(folder / "site")])
        verdict = None
        if not ended.succeeded:
            verdict = "it breaks a command"
        elif _trained(folder / "run") != self.expected:
            verdict = "it changes the result"
        return source, ended, verdict


KINDS: dict[str, Callable[[ForkServer, Path], Kind]] = {
    "configs": Configs,
    "runs": RunFolders,
    "hf": HuggingFaceFolders,
    "data": DataFiles,
    "plugins": Plugins,
}
