"""The part of wandb's server that sweeps need, on this machine: it keeps a sweep and hands out one trial of it."""

import itertools
import json
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import yaml


class SweepServer(ThreadingHTTPServer):
    """Attributes: config, of the sweep that somebody created; seen, the names of all operations asked for."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.config, self.seen, self.beats = None, [], itertools.count()

    def answer(self, operation, variables):
        """The data of one GraphQL operation."""
        self.seen.append(operation)
        project = {"id": "p", "name": "a-project", "entity": {"id": "e", "name": "someone"}}
        if operation == "UpsertSweep":
            self.config = yaml.safe_load(variables["config"])
            sweep = {"name": "a-sweep", "project": project}
            return {"upsertSweep": {"sweep": sweep, "configValidationWarnings": []}}
        if operation == "SweepWithRuns":
            sweep = {"name": variables["sweep"], "config": yaml.safe_dump(self.config), "runs": {"edges": []}}
            return {"project": {"sweep": sweep}}
        if operation == "CreateAgent":
            return {"createAgent": {"agent": {"id": "an-agent"}}}
        if operation == "Heartbeat":
            return {"agentHeartbeat": {"agent": {"id": "an-agent"}, "commands": json.dumps(self.commands(variables))}}
        viewer = {"id": "v", "entity": "someone", "username": "someone", "flags": "{}", "teams": {"edges": []}}
        return {"viewer": viewer, "serverInfo": {"cliVersionInfo": {}, "latestLocalVersionInfo": None}}

    def commands(self, variables):
        """One trial with the first value of every parameter; the end once it is over."""
        if next(self.beats) == 0:
            first = {
                name: {"value": options.get("value", options.get("values", [None])[0])}
                for name, options in self.config["parameters"].items()
            }
            return [{"type": "run", "run_id": "a-trial", "program": self.config["program"], "args": first}]
        return [] if "a-trial" in json.loads(variables["runState"]) else [{"type": "exit"}]


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])) or "{}")
        match = re.search(r"(?:query|mutation)\s+(\w+)", asked.get("query", ""))
        said = json.dumps(
            {"data": self.server.answer(match[1] if match else "", asked.get("variables") or {})}
        ).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(said)))
        self.end_headers()
        self.wfile.write(said)

    def log_message(self, *_):
        """Nothing."""


@contextmanager
def sweep_server():
    """A server, and the variables of the environment that lead wandb to it."""
    server = SweepServer()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    where = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield server, {"WANDB_BASE_URL": where, "WANDB_API_KEY": "0" * 40, "WANDB_SILENT": "true"}
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
