"""The unmodified Python client on a running cluster: objects, watch, patches, apply, custom resources, logs and exec.

Ends with status 0 and the word "done" if every answer was as Kubernetes gives it.
"""

import threading
import time

from kubernetes import client, config, dynamic, watch
from kubernetes.client.rest import ApiException
from kubernetes.stream import stream

NAMESPACE = "python"
PATIENCE_S = 60


def eventually(what, check):
    """Calls check until it returns something; fails after PATIENCE_S."""
    end = time.monotonic() + PATIENCE_S
    while True:
        got = check()
        if got:
            return got
        if time.monotonic() > end:
            raise AssertionError(f"not in {PATIENCE_S} s: {what}")
        time.sleep(0.05)


def refused(code, call):
    try:
        call()
    except ApiException as error:
        assert error.status == code, f"{error.status} instead of {code}: {error.body}"
        return error
    raise AssertionError(f"was not refused with {code}")


def objects(core):
    core.create_namespace({"metadata": {"name": NAMESPACE}})
    made = core.create_namespaced_config_map(NAMESPACE, {"metadata": {"name": "a"}, "data": {"k": "v"}})
    assert made.metadata.uid and made.data == {"k": "v"}
    refused(409, lambda: core.create_namespaced_config_map(NAMESPACE, {"metadata": {"name": "a"}}))
    refused(422, lambda: core.create_namespaced_config_map(NAMESPACE, {"metadata": {"name": "A"}}))
    made.data["k"] = "w"
    core.replace_namespaced_config_map("a", NAMESPACE, made)
    refused(409, lambda: core.replace_namespaced_config_map("a", NAMESPACE, made))
    patched = core.patch_namespaced_config_map("a", NAMESPACE, {"data": {"l": "x"}})
    assert patched.data == {"k": "w", "l": "x"}, patched.data
    refused(404, lambda: core.read_namespaced_config_map("none", NAMESPACE))


def watches(core):
    seen = []
    start = core.list_namespaced_config_map(NAMESPACE).metadata.resource_version
    opened = watch.Watch()

    def follow():
        events = opened.stream(core.list_namespaced_config_map, NAMESPACE, resource_version=start, timeout_seconds=PATIENCE_S)
        for event in events:
            if event["object"].metadata.name == "watched":
                seen.append(event["type"])
            if event["type"] == "DELETED":
                opened.stop()

    thread = threading.Thread(target=follow)
    thread.start()
    core.create_namespaced_config_map(NAMESPACE, {"metadata": {"name": "watched"}})
    core.patch_namespaced_config_map("watched", NAMESPACE, {"data": {"a": "b"}})
    core.delete_namespaced_config_map("watched", NAMESPACE)
    thread.join(PATIENCE_S)
    assert seen == ["ADDED", "MODIFIED", "DELETED"], seen


def custom(api):
    definitions = client.ApiextensionsV1Api(api)
    schema = {"type": "object", "properties": {"spec": {"type": "object", "required": ["size"], "properties": {
        "size": {"type": "integer", "minimum": 1}, "color": {"type": "string", "default": "red"}}}}}
    definitions.create_custom_resource_definition({
        "metadata": {"name": "gems.python.example.com"},
        "spec": {"group": "python.example.com", "scope": "Namespaced", "names": {"plural": "gems", "kind": "Gem"},
                 "versions": [{"name": "v1", "served": True, "storage": True, "schema": {"openAPIV3Schema": schema},
                               "subresources": {"status": {}}}]}})
    established = lambda: [c for c in definitions.read_custom_resource_definition("gems.python.example.com").status.conditions
                           or [] if c.type == "Established" and c.status == "True"]
    eventually("the definition is established", established)
    gems = dynamic.DynamicClient(api).resources.get(api_version="python.example.com/v1", kind="Gem")
    body = {"apiVersion": "python.example.com/v1", "kind": "Gem", "metadata": {"name": "g"}, "spec": {"size": 1}}
    made = gems.create(body=body, namespace=NAMESPACE)
    assert made.spec.color == "red", made
    body["spec"] = {"size": 0}
    error = refused(422, lambda: gems.replace(body=dict(body, metadata=made.metadata.to_dict()), namespace=NAMESPACE))
    assert "should be greater than or equal to 1" in str(error.body), error.body
    body["spec"] = {"size": 7}
    applied = gems.server_side_apply(body=body, namespace=NAMESPACE, field_manager="python", force_conflicts=True)
    assert applied.spec.size == 7 and applied.metadata.managedFields, applied
    patched = gems.patch(body={"spec": {"color": "green"}}, name="g", namespace=NAMESPACE,
                         content_type="application/merge-patch+json")
    assert patched.spec.color == "green"
    assert [g.metadata.name for g in gems.get(namespace=NAMESPACE).items] == ["g"]
    definitions.delete_custom_resource_definition("gems.python.example.com")


def pods(core):
    core.create_namespaced_pod(NAMESPACE, {"metadata": {"name": "box"}, "spec": {
        "terminationGracePeriodSeconds": 0,
        "containers": [{"name": "box", "image": "box:1",
                        "command": ["/bin/busybox", "sh", "-c", "echo started; exec /bin/busybox sleep 3600"]}]}})
    eventually("the pod runs", lambda: core.read_namespaced_pod("box", NAMESPACE).status.phase == "Running")
    eventually("its log", lambda: "started" in core.read_namespaced_pod_log("box", NAMESPACE))
    said = stream(core.connect_get_namespaced_pod_exec, "box", NAMESPACE, command=["/bin/busybox", "echo", "hello"],
                  stderr=True, stdin=False, stdout=True, tty=False)
    assert said == "hello\n", repr(said)
    core.delete_namespaced_pod("box", NAMESPACE)


def main():
    config.load_kube_config()
    api = client.ApiClient()
    core = client.CoreV1Api(api)
    assert client.VersionApi(api).get_code().minor == "36"
    objects(core)
    watches(core)
    custom(api)
    pods(core)
    core.delete_namespace(NAMESPACE)
    eventually("the namespace goes", lambda: NAMESPACE not in [n.metadata.name for n in core.list_namespace().items])
    print("done")


if __name__ == "__main__":
    main()
