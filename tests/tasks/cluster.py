"""Runs a packaged workflow as a cluster would: each task attempt is a process that gets its inputs from a store.

What Flyte's propeller does is kept to what our workflows use: tasks, one map over a list, a failure node, retries of a
task that was killed. The processes are started with the very command of the task's container.
"""

from __future__ import annotations

import os
import subprocess
import tarfile
from dataclasses import dataclass, field
from pathlib import Path

from flyteidl.admin import task_pb2, workflow_pb2
from flyteidl.core import errors_pb2, literals_pb2, types_pb2
from flytekit.core.context_manager import FlyteContextManager
from flytekit.core.type_engine import TypeEngine

Literals = dict[str, literals_pb2.Literal]


class NodeFailedError(RuntimeError):
    """A task wrote error.pb, or died on its last attempt."""


@dataclass
class Package:
    """Task and workflow templates of a ``pyflyte package`` archive, by name."""

    tasks: dict = field(default_factory=dict)
    workflows: dict = field(default_factory=dict)

    @staticmethod
    def load(archive: Path) -> Package:
        package = Package()
        with tarfile.open(archive) as file:
            for member in file.getmembers():
                content = file.extractfile(member).read()
                if member.name.endswith("_1.pb"):
                    template = task_pb2.TaskSpec.FromString(content).template
                    package.tasks[template.id.name] = template
                elif member.name.endswith("_2.pb"):
                    template = workflow_pb2.WorkflowSpec.FromString(content).template
                    package.workflows[template.id.name] = template
        return package


@dataclass
class Cluster:
    """Executes one workflow.

    Args:
        package: What was packaged.
        root: Folder that stands for the object store.
        execution_id: Name of the execution.
        cwd: The repository, as WORKDIR in the image.
        env: Further environment of every task.
        kill_first_attempt_of: Task whose first attempt is killed once it has written a checkpoint.
        kill_at_once: Task whose first attempt is killed before it has written anything.
    """

    package: Package
    root: Path
    execution_id: str
    cwd: Path
    env: dict[str, str]
    kill_first_attempt_of: str = ""
    kill_at_once: str = ""
    attempts: list[tuple[str, int]] = field(default_factory=list)

    def run(self, workflow: str, inputs: dict) -> dict:
        """Outputs of a workflow as Python values."""
        template = self.package.workflows[workflow]
        context = FlyteContextManager.current_context()
        variables = template.interface.inputs.variables
        scope = {"": {}}
        for name, value in inputs.items():
            expected = _literal_type(variables[name].type)
            scope[""][name] = TypeEngine.to_literal(context, value, type(value), expected).to_flyte_idl()
        try:
            pending = {n.id: n for n in template.nodes if n.id not in ("start-node", "end-node")}
            while pending:
                ready = [
                    n for n in pending.values() if all(u == "start-node" or u in scope for u in n.upstream_node_ids)
                ]
                for node in ready:
                    scope[node.id] = self._node(node, scope)
                    del pending[node.id]
        except NodeFailedError as error:
            failure = template.failure_node
            bound = {b.var: _bind(b.binding, scope) for b in failure.inputs if b.var in scope[""]}
            task = self.package.tasks[failure.task_node.reference_id.name]
            bound["err"] = _error_literal(task, str(error))
            self._task(task, bound, "on-failure")
            raise
        return {b.var: _python(_bind(b.binding, scope)) for b in template.outputs}

    def _node(self, node, scope) -> Literals:
        inputs = {b.var: _bind(b.binding, scope) for b in node.inputs}
        if node.WhichOneof("target") == "task_node":
            return self._task(self.package.tasks[node.task_node.reference_id.name], inputs, node.id)
        task = self.package.tasks[node.array_node.node.task_node.reference_id.name]
        [size] = {len(v.collection.literals) for k, v in inputs.items() if k not in node.array_node.bound_inputs}
        parts = []
        for i in range(size):
            index = {"BATCH_JOB_ARRAY_INDEX_VAR_NAME": "FLYTE_K8S_ARRAY_INDEX", "FLYTE_K8S_ARRAY_INDEX": str(i)}
            parts.append(self._task(task, inputs, f"{node.id}-{i}", index))
        collected = {v: [part[v] for part in parts] for v in task.interface.outputs.variables}
        return {v: literals_pb2.Literal(collection={"literals": values}) for v, values in collected.items()}

    def _task(self, task, inputs: Literals, node: str, extra: dict[str, str] | None = None) -> Literals:
        meta, previous = self.root / "meta" / self.execution_id / node, ""
        meta.mkdir(parents=True)
        (meta / "inputs.pb").write_bytes(literals_pb2.LiteralMap(literals=inputs).SerializeToString())
        for attempt in range(task.metadata.retries.retries + 1):
            self.attempts.append((task.id.name, attempt))
            outputs = meta / str(attempt)
            outputs.mkdir()
            raw = self.root / "raw" / self.execution_id / node / str(attempt)
            checkpoint = f"{raw}/checkpoints"
            values = {
                "{{.input}}": f"{meta}/inputs.pb",
                "{{.outputPrefix}}": str(outputs),
                "{{.rawOutputDataPrefix}}": str(raw),
                "{{.checkpointOutputPrefix}}": checkpoint,
                "{{.prevCheckpointPrefix}}": previous,
            }
            container = task.container
            argv = [values.get(part, part) for part in (*container.command, *container.args)]
            env = {**os.environ, **{e.key: e.value for e in container.env}, **self.env, **(extra or {})}
            env |= {"FLYTE_INTERNAL_EXECUTION_ID": self.execution_id, "FLYTE_ATTEMPT_NUMBER": str(attempt)}
            env |= {"FLYTE_INTERNAL_EXECUTION_PROJECT": "p", "FLYTE_INTERNAL_EXECUTION_DOMAIN": "d"}
            kill_at = {self.kill_first_attempt_of: Path(checkpoint), self.kill_at_once: meta}.get(task.id.name)
            output, status = _start(argv, env, self.cwd, kill_at if attempt == 0 else None)
            if (outputs / "outputs.pb").exists():
                return dict(literals_pb2.LiteralMap.FromString((outputs / "outputs.pb").read_bytes()).literals)
            if (outputs / "error.pb").exists():
                raise NodeFailedError(
                    errors_pb2.ErrorDocument.FromString((outputs / "error.pb").read_bytes()).error.message
                )
            previous = checkpoint
        raise NodeFailedError(f"{node}: exit {status} without error.pb: {output[-2000:]}")


def _start(argv, env, cwd, kill_at: Path | None) -> tuple[str, int]:
    """Run a task; with ``kill_at``, kill it (-9) as soon as a file lies there."""
    with subprocess.Popen(
        argv, env=env, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        while kill_at is not None and process.poll() is None:
            if kill_at.exists() and any(p.is_file() for p in kill_at.rglob("*")):
                process.kill()
            try:
                process.wait(0.02)
            except subprocess.TimeoutExpired:
                continue
        return process.communicate()[0], process.returncode


def _bind(binding, scope: dict[str, Literals]) -> literals_pb2.Literal:
    if binding.WhichOneof("value") == "promise":
        return scope[binding.promise.node_id][binding.promise.var]
    if binding.WhichOneof("value") == "collection":
        values = [_bind(b, scope) for b in binding.collection.bindings]
        return literals_pb2.Literal(collection={"literals": values})
    return literals_pb2.Literal(scalar=binding.scalar)


def _literal_type(idl):
    from flytekit.models.types import LiteralType

    return LiteralType.from_flyte_idl(idl)


def _python(literal):
    primitive = literal.scalar.primitive
    return getattr(primitive, primitive.WhichOneof("value"))


def _error_literal(task, message: str) -> literals_pb2.Literal:
    """What propeller puts into the failure node's ``err``: the error variant of the optional type."""
    variants = task.interface.inputs.variables["err"].type.union_type.variants
    [variant] = [v for v in variants if v.simple == types_pb2.ERROR]
    value = literals_pb2.Literal(scalar={"error": types_pb2.Error(failed_node_id="n", message=message)})
    return literals_pb2.Literal(scalar={"union": {"value": value, "type": variant}})
