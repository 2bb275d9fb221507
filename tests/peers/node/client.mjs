// The unmodified @kubernetes/client-node on a running cluster: objects, watch, patches, apply, custom resources, log, exec.
// Ends with status 0 and the word "done" if every answer was as Kubernetes gives it.
import assert from "node:assert/strict";
import { Writable } from "node:stream";
import { setTimeout as sleep } from "node:timers/promises";
import * as k8s from "@kubernetes/client-node";

const namespace = "node";
const PATIENCE_MS = 60_000;

const config = new k8s.KubeConfig();
config.loadFromDefault();
const core = config.makeApiClient(k8s.CoreV1Api);

async function eventually(what, check) {
  const end = Date.now() + PATIENCE_MS;
  for (;;) {
    const got = await check();
    if (got) return got;
    assert.ok(Date.now() < end, `not in ${PATIENCE_MS} ms: ${what}`);
    await sleep(50);
  }
}

async function refused(code, call) {
  try {
    await call();
  } catch (error) {
    assert.equal(error.code, code, String(error));
    return error;
  }
  assert.fail(`was not refused with ${code}`);
}

async function objects() {
  await core.createNamespace({ body: { metadata: { name: namespace } } });
  const made = await core.createNamespacedConfigMap({ namespace, body: { metadata: { name: "a" }, data: { k: "v" } } });
  assert.ok(made.metadata.uid);
  await refused(409, () => core.createNamespacedConfigMap({ namespace, body: { metadata: { name: "a" } } }));
  made.data.k = "w";
  await core.replaceNamespacedConfigMap({ name: "a", namespace, body: made });
  await refused(409, () => core.replaceNamespacedConfigMap({ name: "a", namespace, body: made }));
  const merge = k8s.setHeaderOptions("Content-Type", k8s.PatchStrategy.MergePatch);
  const patched = await core.patchNamespacedConfigMap({ name: "a", namespace, body: { data: { l: "x" } } }, merge);
  assert.deepEqual(patched.data, { k: "w", l: "x" });
  await refused(404, () => core.readNamespacedConfigMap({ name: "none", namespace }));
}

async function watches() {
  const path = `/api/v1/namespaces/${namespace}/configmaps`;
  const list = () => core.listNamespacedConfigMap({ namespace });
  const informer = k8s.makeInformer(config, path, list);
  const seen = [];
  for (const event of ["add", "update", "delete"]) {
    informer.on(event, (map) => map.metadata.name === "watched" && seen.push(event));
  }
  await informer.start();
  await core.createNamespacedConfigMap({ namespace, body: { metadata: { name: "watched" } } });
  await eventually("added", async () => seen.includes("add"));
  const merge = k8s.setHeaderOptions("Content-Type", k8s.PatchStrategy.MergePatch);
  await core.patchNamespacedConfigMap({ name: "watched", namespace, body: { data: { a: "b" } } }, merge);
  await eventually("updated", async () => seen.includes("update"));
  await core.deleteNamespacedConfigMap({ name: "watched", namespace });
  await eventually("deleted", async () => seen.includes("delete"));
  await informer.stop();
  assert.deepEqual(seen, ["add", "update", "delete"]);
}

async function custom() {
  const name = "gems.node.example.com";
  const group = "node.example.com";
  const definitions = config.makeApiClient(k8s.ApiextensionsV1Api);
  const schema = { type: "object", properties: { spec: { type: "object", required: ["size"], properties: {
    size: { type: "integer", minimum: 1 }, color: { type: "string", _default: "red" } } } } };
  await definitions.createCustomResourceDefinition({ body: {
    metadata: { name },
    spec: { group, scope: "Namespaced", names: { plural: "gems", kind: "Gem" },
      versions: [{ name: "v1", served: true, storage: true, schema: { openAPIV3Schema: schema } }] } } });
  await eventually("established", async () => {
    const crd = await definitions.readCustomResourceDefinition({ name });
    return crd.status.conditions?.some((c) => c.type === "Established" && c.status === "True");
  });
  const gems = config.makeApiClient(k8s.CustomObjectsApi);
  const at = { group, version: "v1", namespace, plural: "gems" };
  const gem = (spec) => ({ apiVersion: `${group}/v1`, kind: "Gem", metadata: { name: "g" }, spec });
  const made = await gems.createNamespacedCustomObject({ ...at, body: gem({ size: 1 }) });
  assert.equal(made.spec.color, "red");
  await refused(422, () => gems.createNamespacedCustomObject({ ...at, body: { ...gem({ size: 0 }), metadata: { name: "h" } } }));
  const apply = k8s.setHeaderOptions("Content-Type", k8s.PatchStrategy.ServerSideApply);
  const applied = await gems.patchNamespacedCustomObject(
    { ...at, name: "g", body: gem({ size: 7 }), fieldManager: "node", force: true }, apply);
  assert.equal(applied.spec.size, 7);
  const list = await gems.listNamespacedCustomObject(at);
  assert.deepEqual(list.items.map((g) => g.metadata.name), ["g"]);
  await definitions.deleteCustomResourceDefinition({ name });
}

function sink() {
  let text = "";
  const stream = new Writable({ write(chunk, _, next) { text += chunk; next(); } });
  return [stream, () => text];
}

async function pods() {
  await core.createNamespacedPod({ namespace, body: { metadata: { name: "box" }, spec: {
    terminationGracePeriodSeconds: 0,
    containers: [{ name: "box", image: "box:1",
      command: ["/bin/busybox", "sh", "-c", "echo started; exec /bin/busybox sleep 3600"] }] } } });
  await eventually("the pod runs", async () =>
    (await core.readNamespacedPod({ name: "box", namespace })).status.phase === "Running");
  await eventually("its log", async () => (await core.readNamespacedPodLog({ name: "box", namespace })).includes("started"));
  const [out, said] = sink();
  const status = await new Promise((resolve, reject) => {
    new k8s.Exec(config)
      .exec(namespace, "box", "box", ["/bin/busybox", "echo", "hello"], out, process.stderr, null, false, resolve)
      .catch(reject);
  });
  assert.equal(status.status, "Success");
  await eventually("the output", async () => said() === "hello\n");
  await core.deleteNamespacedPod({ name: "box", namespace });
}

await objects();
await watches();
await custom();
await pods();
await core.deleteNamespace({ name: namespace });
await eventually("the namespace goes", async () =>
  !(await core.listNamespace()).items.some((n) => n.metadata.name === namespace));
console.log("done");
process.exit(0);
