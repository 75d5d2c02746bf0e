"""--push_to_hub against an endpoint on loopback that speaks the hub's upload protocol."""

import base64
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from pipelines import build

ROOT = Path(__file__).resolve().parent.parent


class Hub(BaseHTTPRequestHandler):
    """Creates repositories, takes commits whose files come inline, and remembers them; knows one token."""

    def reply(self, content, status=200):
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def body(self):
        if self.headers.get("Transfer-Encoding") == "chunked":
            chunks = iter(lambda: self.rfile.read(int(self.rfile.readline(), 16) + 2)[:-2], b"")
            return b"".join(chunks)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def do_GET(self):
        self.reply({"name": "user", "type": "user", "auth": {"accessToken": {"role": "write"}}})

    def do_POST(self):
        body, store = self.body(), self.server.store
        if self.headers.get("Authorization") != "Bearer hf_good":
            return self.reply({"error": "Invalid username or password."}, 401)
        if self.path == "/api/repos/create":
            content = json.loads(body)
            store["created"].append(content)
            self.reply({"url": f"{self.server.address}/user/{content['name']}", "id": f"user/{content['name']}"})
        elif "/preupload/" in self.path:
            files = [{"path": entry["path"], "uploadMode": "regular", "shouldIgnore": False}
                     for entry in json.loads(body)["files"]]  # fmt: skip
            self.reply({"files": files})
        elif "/commit/" in self.path:
            for line in body.splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    store["files"][entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
            self.reply(
                {"commitUrl": f"{self.server.address}/user/no-boot/commit/1", "commitOid": "1", "success": True}
            )
        else:
            self.reply({})

    def log_message(self, *_):
        pass


@pytest.fixture
def hub():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.address = f"http://127.0.0.1:{server.server_address[1]}"
    server.store = {"created": [], "files": {}}
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


def unlearn(tmp_path, endpoint, token, **changes):
    build("sd").save_pretrained(tmp_path / "base")
    settings = {
        "pretrained_model_name_or_path": tmp_path / "base",
        "output_dir": tmp_path / "run",
        "concept": "boot",
        "retain_prompts": "[a sneaker]",
        "num_generated_images": 2,
        "generation.num_inference_steps": 1,
        "evaluation.sampling.num_inference_steps": 1,
        "evaluation.images_per_label": 1,
        "resolution": 32,
        "max_train_steps": 2,
        "checkpointing_steps": 1,
        "objective.name": "ga",
        "barrier.reduced_dim": 4,
        "push_to_hub": "true",
        **changes,
    }
    words = [word for key, value in settings.items() for word in (f"--{key}", str(value))]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": "0"}
    environment |= {"HF_TOKEN": token, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path / "home")}
    command = [sys.executable, "train_scripts/unlearn_sd.py", *words]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)


def test_a_run_is_uploaded_without_checkpoints(hub, tmp_path):
    done = unlearn(tmp_path, hub.address, "hf_good", hub_model_id="user/no-boot", hub_private="true")
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"{hub.address}/user/no-boot" in done.stdout
    first = hub.store["created"][0]
    assert first["name"] == "no-boot" and (first.get("private") is True or first.get("visibility") == "private")
    files, output = hub.store["files"], tmp_path / "run"
    wanted = {"model_index.json", "README.md", "barrier_config.json", "metrics.json", "manifest.json"}
    wanted |= {"erased_concepts.json", "unet/diffusion_pytorch_model.safetensors"}
    assert wanted <= set(files)
    assert (output / "checkpoints").is_dir() and not any(path.startswith(("checkpoints", "logs")) for path in files)
    assert all(content == (output / path).read_bytes() for path, content in files.items())
    assert 'from_pretrained("user/no-boot")' in (output / "README.md").read_text()
    assert "hf_good" not in done.stdout + done.stderr
    assert not any(b"hf_good" in path.read_bytes() for path in output.rglob("*") if path.is_file())


def test_a_wrong_token_is_an_error_before_any_work(hub, tmp_path):
    done = unlearn(tmp_path, hub.address, "hf_bad", hub_model_id="user/no-boot")
    assert done.returncode == 1 and "training" not in done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "cannot write to hub repository 'user/no-boot'" in line and "hf auth login" in line
    assert not hub.store["files"] and not (tmp_path / "run" / "cache").exists()
