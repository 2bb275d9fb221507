//! What users get wrong: each mistake is named precisely, nothing is half made, and every process stays up.

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};

use crate::{
    arm::{AKS_API, Arm, NETWORK_API, cluster, curl, network},
    instance::Instance,
};

/// Standard error of `oaks up` with a mistake holds all `words`; nothing of an instance is left by the attempt.
fn up_refuses(i: &Instance, args: &[&str], words: &[&str]) -> Result<()> {
    let before = i.host.snapshot()?;
    let said = i.fails(&[&["up"], args].concat())?;
    for word in words {
        ensure!(said.contains(word), "oaks up {args:?} does not say {word:?}: {said}");
    }
    let after = i.host.snapshot()?;
    ensure!(
        before == after,
        "oaks up {args:?} left something:\n--- before\n{}\n--- after\n{}",
        before.0,
        after.0
    );
    Ok(())
}

#[test]
fn up_with_mistakes() -> Result<()> {
    let i = Instance::new()?;
    let mut listener = i.command("busybox").args(["nc", "-l", "-p", "7777"]).spawn()?;
    testkit::eventually("a program at port 7777", 5, || {
        let all = i.host.run("cat", &["/proc/net/tcp", "/proc/net/tcp6"])?;
        ensure!(all.contains(":1E61 "), "{all}");
        Ok::<_, anyhow::Error>(())
    })?;
    let taken = up_refuses(&i, &["--api-listen=0.0.0.0:7777"], &["7777", "--api-listen", "taken"]);
    let taken_arm = up_refuses(&i, &["--arm-listen=0.0.0.0:7777"], &["7777", "--arm-listen", "taken"]);
    // It ends with its first caller.
    i.host
        .output("curl", &["-s", "--max-time", "1", "http://127.0.0.1:7777/"])?;
    listener.wait()?;
    taken.and(taken_arm)?;

    for (name, text, words) in [
        ("no.yaml", "public-pool: [", &["no.yaml", "config file"][..]),
        ("key.yaml", "public-pol: 198.19.0.0/16", &["key.yaml", "public-pol"]),
        ("kind.yaml", "api-listen: here", &["kind.yaml", "api-listen"]),
    ] {
        let path = i.file(name, text)?;
        up_refuses(&i, &["--config", &path], words)?;
    }
    up_refuses(&i, &["--config", "/nowhere.yaml"], &["/nowhere.yaml"])?;
    up_refuses(&i, &["--public-pool=banana"], &["--public-pool", "banana"])?;
    up_refuses(&i, &["--public-pool=198.19.0.0/30"], &["--public-pool", "/28"])?;
    up_refuses(&i, &["--public-pool=127.1.0.0/16"], &["--public-pool", "127.0.0.0/8"])?;
    up_refuses(&i, &["--uplink=nolink0"], &["nolink0"])?;
    up_refuses(&i, &["--libexec=/nowhere"], &["/nowhere"])?;
    up_refuses(&i, &["--instance=far-too-long"], &["far-too-long", "9"])?;

    i.host.run(
        "ip",
        &["link", "add", "other0", "type", "veth", "peer", "name", "other1"],
    )?;
    i.host.run("ip", &["link", "set", "other0", "up"])?;
    i.host.run("ip", &["link", "set", "other1", "up"])?;
    i.host.run("ip", &["route", "add", "198.19.7.0/24", "dev", "other0"])?;
    up_refuses(&i, &[], &["198.19.7.0/24", "other0", "--public-pool"])?;

    let program = testkit::bin("oaks");
    for (drop, name) in [("-net_admin", "CAP_NET_ADMIN"), ("-sys_admin", "CAP_SYS_ADMIN")] {
        let out = i
            .command("setpriv")
            .args(["--bounding-set", drop, "--inh-caps", drop, "--"])
            .arg(&program)
            .arg("up")
            .output()?;
        let said = String::from_utf8_lossy(&out.stderr).into_owned();
        ensure!(!out.status.success() && said.contains(name), "without {name}: {said}");
    }
    // None of this spoils the way for a good call.
    i.run(&["up", "--public-pool=198.18.0.0/16"])?;
    Ok(())
}

#[test]
fn requests_with_mistakes() -> Result<()> {
    let i = Instance::new()?;
    i.run(&["up"])?;
    let before = i.status()?;
    let arm = Arm::login(&i)?;
    tokens(&i, &arm)?;
    bodies(&i, &arm)?;
    networks(&arm)?;
    clusters(&i, &arm)?;
    api_server(&i)?;

    // Nothing is half made, and the same processes run.
    let (_, all) = arm.get(&format!("{}/resources", arm.group), "2024-11-01")?;
    let names: Vec<&str> = all["value"]
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(|r| r["name"].as_str())
        .collect();
    ensure!(names == ["good"], "resources: {all}");
    let after = i.status()?;
    let pids = |s: &Value| [s["processes"][0]["pid"].clone(), s["processes"][1]["pid"].clone()];
    ensure!(pids(&before) == pids(&after), "{before}\n{after}");
    ensure!(after["machines"] == json!([]), "machines: {after}");
    Ok(())
}

/// The answer is ARM's error with this status, code and words.
fn refused(what: &str, answer: &(u16, Value), status: u16, code: &str, words: &[&str]) -> Result<()> {
    let error = &answer.1["error"];
    let message = error["message"]
        .as_str()
        .with_context(|| format!("{what}: {answer:?}"))?;
    ensure!(
        answer.0 == status && error["code"] == code,
        "{what}: not {status} {code}: {answer:?}"
    );
    for word in words {
        ensure!(message.contains(word), "{what} does not say {word:?}: {message}");
    }
    Ok(())
}

fn tokens(i: &Instance, arm: &Arm<'_>) -> Result<()> {
    let url = format!("{}{}?api-version=2024-11-01", arm.base, arm.group);
    for header in ["Authorization: Bearer a.b.c", "Authorization: Basic eDp5", "X-None: 1"] {
        let answer = curl(i, &["--cacert", &arm.ca, "-H", header, &url])?;
        ensure!(
            answer.0 == 401 && answer.1["error"]["code"].is_string(),
            "{header}: {answer:?}"
        );
    }
    // One bit of the signature changed.
    let (text, signature) = arm.token.rsplit_once('.').context("a token")?;
    let other = if signature.starts_with('A') { 'B' } else { 'A' };
    let header = format!("Authorization: Bearer {text}.{other}{}", &signature[1..]);
    let answer = curl(i, &["--cacert", &arm.ca, "-i", "-H", &header, &url])?;
    let said = answer.1.as_str().unwrap_or_default().to_ascii_lowercase();
    ensure!(
        answer.0 == 401 && said.contains("www-authenticate: bearer"),
        "a forged token: {answer:?}"
    );
    let form = "grant_type=client_credentials&client_id=nobody&client_secret=wrong&scope=x";
    let answer = curl(
        i,
        &[
            "--cacert",
            &arm.ca,
            "--data",
            form,
            &format!("{}/adfs/oauth2/token", arm.base),
        ],
    )?;
    ensure!(
        matches!(answer.0, 400 | 401) && answer.1["error"] == "invalid_client",
        "a wrong secret: {answer:?}"
    );
    Ok(())
}

fn bodies(_: &Instance, arm: &Arm<'_>) -> Result<()> {
    let id = arm.network_id("bad");
    for body in ["{", "[]", "\"x\"", "{\"location\": \"local\"}x"] {
        let answer = arm.call("PUT", &id, NETWORK_API, body)?;
        refused(body, &answer, 400, "InvalidRequestContent", &[])?;
    }
    let deep = format!("{}{}", "[".repeat(100_000), "]".repeat(100_000));
    let answer = arm.call("PUT", &id, NETWORK_API, &deep)?;
    refused("a deep body", &answer, 400, "InvalidRequestContent", &[])?;
    let large = json!({"location": "local", "tags": {"x": "y".repeat(5 << 20)}}).to_string();
    let answer = arm.call("PUT", &id, NETWORK_API, &large)?;
    refused("a large body", &answer, 413, "RequestContentTooLarge", &[])?;
    let answer = arm.call("PUT", &id, "1999-01-01", "{}")?;
    refused(
        "an unknown api-version",
        &answer,
        400,
        "InvalidApiVersionParameter",
        &["1999-01-01"],
    )?;
    let (status, answer) = arm.get(&id, NETWORK_API)?;
    ensure!(status == 404, "after refused requests: {status} {answer}");
    Ok(())
}

fn networks(arm: &Arm<'_>) -> Result<()> {
    let id = arm.network_id("bad");
    let put = |body: &Value| arm.call("PUT", &id, NETWORK_API, &body.to_string());
    for (body, code, words) in [
        (
            network("10.1.0.0/16", "10.1.0.0/30", "10.1.1.0/24"),
            "NetcfgInvalidSubnet",
            &["10.1.0.0/30", "nodes", "/29"][..],
        ),
        (
            network("10.1.0.0/16", "10.1.0.0/24", "10.1.0.128/25"),
            "NetcfgSubnetRangesOverlap",
            &["nodes", "groups"],
        ),
        (
            network("10.1.0.0/16", "10.2.0.0/24", "10.1.1.0/24"),
            "NetcfgInvalidSubnet",
            &["10.2.0.0/24", "outside"],
        ),
        (
            network("198.19.4.0/24", "198.19.4.0/25", "198.19.4.128/25"),
            "AddressPrefixNotAllowed",
            &["198.19.0.0/16"],
        ),
        (
            network("169.254.0.0/16", "169.254.0.0/24", "169.254.1.0/24"),
            "AddressPrefixNotAllowed",
            &["link-local"],
        ),
        (
            network("10.1.0.0/99", "10.1.0.0/24", "10.1.1.0/24"),
            "InvalidRequestContent",
            &["10.1.0.0/99"],
        ),
    ] {
        refused(&body.to_string(), &put(&body)?, 400, code, words)?;
    }
    let mut two = network("10.1.0.0/16", "10.1.0.0/24", "10.1.1.0/24");
    two["properties"]["addressSpace"]["addressPrefixes"] = json!(["10.1.0.0/16", "10.1.128.0/17"]);
    refused(
        "overlapping prefixes",
        &put(&two)?,
        400,
        "NetcfgVirtualNetworkAddressSpaceOverlap",
        &["10.1.128.0/17"],
    )?;
    let (status, answer) = arm.get(&id, NETWORK_API)?;
    ensure!(status == 404, "after refused networks: {status} {answer}");
    Ok(())
}

fn clusters(i: &Instance, arm: &Arm<'_>) -> Result<()> {
    let good = arm.network_id("good");
    arm.put(
        &good,
        NETWORK_API,
        &network("10.1.0.0/16", "10.1.0.0/26", "10.1.1.0/24"),
    )?;
    let id = arm.cluster_id("bad");
    let put = |body: &Value| arm.call("PUT", &id, AKS_API, &body.to_string());
    // 59 usable addresses; one node takes one and one for each of its 30 pods.
    refused(
        "too many nodes",
        &put(&cluster(&good, 2, false))?,
        400,
        "SubnetIsFull",
        &["nodes", "10.1.0.0/26", "62", "59"],
    )?;
    let mut body = cluster(&good, 1, false);
    body["properties"]["agentPoolProfiles"][0]["vnetSubnetID"] = json!(format!("{good}/subnets/groups"));
    refused(
        "a delegated subnet",
        &put(&body)?,
        400,
        "SubnetIsDelegated",
        &["groups", "containerGroups"],
    )?;
    let mut body = cluster(&good, 1, false);
    body["properties"]["networkProfile"]["serviceCidr"] = json!("10.1.128.0/20");
    body["properties"]["networkProfile"]["dnsServiceIP"] = json!("10.1.128.10");
    refused(
        "Services inside the network",
        &put(&body)?,
        400,
        "ServiceCidrOverlapExistingSubnetsCidr",
        &["10.1.128.0/20"],
    )?;
    let mut body = cluster(&good, 1, false);
    body["properties"]["agentPoolProfiles"][0]["vmSize"] = json!("Standard_Huge");
    let answer = put(&body)?;
    ensure!(
        answer.0 == 400 && answer.1.to_string().contains("Standard_Huge"),
        "an unknown size: {answer:?}"
    );
    let answer = put(&cluster(&arm.network_id("none"), 1, false))?;
    ensure!(
        matches!(answer.0, 400 | 404) && answer.1["error"]["message"].to_string().contains("none"),
        "no such network: {answer:?}"
    );
    let (status, answer) = arm.get(&id, AKS_API)?;
    ensure!(status == 404, "after refused clusters: {status} {answer}");
    let objects = {
        i.run(&["kubeconfig", "save", "oaks-home"])?;
        i.kubectl(&["get", "aks,nic,vm,vn", "-o", "name"])?
    };
    ensure!(objects.is_empty(), "left at home:\n{objects}");
    Ok(())
}

/// Home's API server stands for every cluster's: it is the same code.
fn api_server(i: &Instance) -> Result<()> {
    let text = std::fs::read_to_string(i.data().join("home.kubeconfig"))?;
    let config = i.file("home.kubeconfig", &text)?;
    for (what, out) in [
        ("certificate-authority-data", "ca"),
        ("client-certificate-data", "crt"),
        ("client-key-data", "key"),
    ] {
        let data = text
            .lines()
            .find_map(|l| l.trim().trim_start_matches("- ").strip_prefix(what)?.strip_prefix(": "))
            .with_context(|| format!("{config} lacks {what}"))?;
        let encoded = i.file("data", data.trim().trim_matches('"'))?;
        let decoded = i.host.run("base64", &["-d", &encoded])?;
        i.file(out, &decoded)?;
    }
    let path = |n: &str| {
        i.host
            .dir()
            .join(format!("{}-{n}", i.name))
            .to_string_lossy()
            .into_owned()
    };
    let (ca, crt, key) = (path("ca"), path("crt"), path("key"));
    let url = "https://127.0.0.1:6443/api/v1/namespaces";
    let post = |media: &str, body: &str| -> Result<(u16, Value)> {
        let (kind, body) = (format!("Content-Type: {media}"), format!("@{}", i.file("body", body)?));
        curl(
            i,
            &[
                "--cacert",
                &ca,
                "--cert",
                &crt,
                "--key",
                &key,
                "-H",
                &kind,
                "--data-binary",
                &body,
                url,
            ],
        )
    };
    let deep = format!("{}{}", "[".repeat(100_000), "]".repeat(100_000));
    let namespace = r#"{"apiVersion":"v1","kind":"Namespace","metadata":{"name":"bad","annotations":{"a":"LARGE"}}}"#;
    for (what, media, body, status, reason) in [
        (
            "cut off",
            "application/json",
            "{\"kind\":".to_owned(),
            400,
            "BadRequest",
        ),
        ("a list", "application/json", "[]".to_owned(), 400, "BadRequest"),
        ("deep", "application/json", deep.clone(), 400, "BadRequest"),
        ("deep YAML", "application/yaml", deep, 400, "BadRequest"),
        (
            "no protobuf",
            "application/vnd.kubernetes.protobuf",
            "k8s".to_owned(),
            400,
            "BadRequest",
        ),
        (
            "an unknown format",
            "text/plain",
            "x".to_owned(),
            415,
            "UnsupportedMediaType",
        ),
        (
            "large",
            "application/json",
            namespace.replace("LARGE", &"x".repeat(4 << 20)),
            413,
            "RequestEntityTooLarge",
        ),
        (
            "a bad name",
            "application/json",
            namespace.replace("bad", "Bad_Name"),
            422,
            "Invalid",
        ),
    ] {
        let (got, answer) = post(media, &body)?;
        ensure!(
            got == status && answer["kind"] == "Status" && answer["reason"] == reason && answer["message"].is_string(),
            "{what}: not {status} {reason}: {got} {answer}"
        );
    }
    let answer = curl(i, &["--cacert", &ca, "-H", "Authorization: Bearer x", url])?;
    ensure!(
        answer.0 == 401 && answer.1["reason"] == "Unauthorized",
        "a wrong token: {answer:?}"
    );
    let answer = curl(i, &["--cacert", &ca, url])?;
    ensure!(
        matches!(answer.0, 401 | 403) && answer.1["kind"] == "Status",
        "nobody: {answer:?}"
    );
    let answer = curl(
        i,
        &["--cacert", &ca, "--cert", &crt, "--key", &key, &format!("{url}/bad")],
    )?;
    ensure!(answer.0 == 404, "after refused requests: {answer:?}");
    Ok(())
}
