//! The CNI project's own tool: every verb, version and mode, and the documented list with `portmap` chained, by traffic.

use std::{
    fs,
    io::Read,
    net::TcpStream,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, ensure};
use linux::netns;
use serde_json::{Value, json};

use crate::{
    report::Report,
    tools::{Tools, output},
    world::{MACHINE, OTHER, WHO, World},
};

const VERSIONS: &[&str] = &["0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"];
const MODES: &[&str] = &["transparent", "bridge", "tunnel"];

pub fn run(world: &World, tools: &Tools, report: &mut Report) -> Result<()> {
    for mode in MODES {
        for version in VERSIONS {
            let name = format!("{mode}, CNI {version}: add, check, status, gc, del, del again");
            report.case(&name, || verbs(world, tools, mode, version));
        }
    }
    report.case("the documented list: portmap reached from another machine", || {
        documented_list(world, tools)
    });
    report.case("check finds a pod whose link has vanished", || {
        vanished_link(world, tools)
    });
    report.case("gc releases what a runtime forgot", || forgotten(world, tools));
    Ok(())
}

/// One network's configuration folder.
struct Net<'a> {
    world: &'a World,
    cnitool: PathBuf,
    folder: PathBuf,
    name: String,
}

impl<'a> Net<'a> {
    fn new(world: &'a World, tools: &Tools, name: &str, list: &Value) -> Result<Self> {
        let folder = world.dir.join("net").join(name);
        fs::create_dir_all(&folder)?;
        fs::write(folder.join("10.conflist"), list.to_string())?;
        Ok(Self {
            world,
            cnitool: tools.peer("cnitool"),
            folder,
            name: list["name"].as_str().unwrap_or_default().to_owned(),
        })
    }

    fn plugin(world: &'a World, tools: &Tools, mode: &str, version: &str) -> Result<Self> {
        let name = format!("{mode}-{}", version.replace('.', "-"));
        let list = json!({"cniVersion": version, "name": name, "plugins": [{"type": "azure-vnet", "mode": mode,
            "ipam": {"type": "azure-vnet-ipam"}}]});
        Self::new(world, tools, &name, &list)
    }

    fn command(&self, verb: &str, netns: &Path) -> Command {
        let mut command = self.world.command(&self.cnitool);
        command
            .args([verb, &self.name])
            .arg(netns)
            .env("CNI_PATH", "/opt/cni/bin")
            .env("NETCONFPATH", &self.folder);
        command
    }

    fn call(&self, verb: &str, netns: &Path) -> Result<String> {
        output(&mut self.command(verb, netns)).with_context(|| format!("cnitool {verb}"))
    }
}

fn pod(name: &str) -> Result<PathBuf> {
    let pin = PathBuf::from(format!("/run/netns/{name}"));
    fs::create_dir_all("/run/netns")?;
    netns::create_named(&pin)?;
    Ok(pin)
}

fn address(result: &str) -> Result<(Value, String)> {
    let result: Value = serde_json::from_str(result).context("cnitool add prints a result")?;
    let address = result["ips"][0]["address"]
        .as_str()
        .context("the result has an address")?;
    let address = address.split('/').next().unwrap_or(address).to_owned();
    Ok((result, address))
}

/// The other machine sees the pod's own address.
fn reaches_other(pin: &Path, address: &str) -> Result<()> {
    let seen = netns::run_in(pin, || -> Result<String> {
        let mut text = String::new();
        TcpStream::connect((OTHER, WHO))?.read_to_string(&mut text)?;
        Ok(text)
    })??;
    ensure!(seen == address, "the other machine sees {seen}, not {address}");
    Ok(())
}

fn verbs(world: &World, tools: &Tools, mode: &str, version: &str) -> Result<()> {
    let net = Net::plugin(world, tools, mode, version)?;
    let pin = pod(&net.name)?;
    let (result, address) = address(&net.call("add", &pin)?)?;
    ensure!(
        result["cniVersion"] == version,
        "the result is of version {}",
        result["cniVersion"]
    );
    reaches_other(&pin, &address)?;
    let check = net.call("check", &pin);
    if version.starts_with("0.3") {
        ensure!(check.is_err(), "libcni refuses CHECK before 0.4.0");
    } else {
        check?;
    }
    net.call("status", &pin)?;
    net.call("del", &pin)?;
    net.call("del", &pin).context("the second time")?;
    ensure!(net.call("check", &pin).is_err(), "check passes after del");
    net.call("gc", &pin)?;
    netns::delete(&pin)?;
    world.clean()
}

fn documented_list(world: &World, tools: &Tools) -> Result<()> {
    let list: Value = serde_json::from_slice(&fs::read("/etc/cni/net.d/10-azure.conflist")?)?;
    let net = Net::new(world, tools, "azure", &list)?;
    let pin = pod("documented")?;
    let ports = r#"{"portMappings":[{"hostPort":18080,"containerPort":80,"protocol":"tcp"}]}"#;
    let result = output(net.command("add", &pin).env("CAP_ARGS", ports))?;
    let (_, address) = address(&result)?;
    let [image, _] = crate::image::archives(&world.dir)?;
    let www = image.with_extension("").join("root/www");
    let mut server = Command::new("nsenter")
        .arg(format!("--net={}", pin.display()))
        .args(["--", "busybox", "httpd", "-f", "-p", "80", "-h"])
        .arg(&www)
        .spawn()?;
    let reached = (|| {
        let pod = format!("{address}:80");
        testkit::eventually("the pod's server", 10, || world.get(&pod, "/hello"))?;
        let seen = world.get(&format!("{MACHINE}:18080"), "/hello")?;
        ensure!(seen == "hello", "by the host port: {seen}");
        let seen = world.get_local(&format!("{MACHINE}:18080"), "/hello")?;
        ensure!(seen == "hello", "by the host port from the machine itself: {seen}");
        Ok(())
    })();
    let _ = server.kill();
    let _ = server.wait();
    output(net.command("del", &pin).env("CAP_ARGS", ports))?;
    netns::delete(&pin)?;
    reached?;
    ensure!(
        world.get(&format!("{MACHINE}:18080"), "/hello").is_err(),
        "the host port still answers"
    );
    world.clean()
}

fn vanished_link(world: &World, tools: &Tools) -> Result<()> {
    let net = Net::plugin(world, tools, "transparent", "1.1.0")?;
    let pin = pod("vanished")?;
    net.call("add", &pin)?;
    let links = world.pod_links()?;
    let link = links.first().context("the pod has a link")?;
    output(world.command("ip").args(["link", "del", link]))?;
    ensure!(net.call("check", &pin).is_err(), "check passes without a link");
    net.call("del", &pin)?;
    netns::delete(&pin)?;
    world.clean()
}

/// A pod whose network namespace and cached attachment are gone, as after a crash of the runtime.
fn forgotten(world: &World, tools: &Tools) -> Result<()> {
    let net = Net::plugin(world, tools, "transparent", "1.1.0")?;
    let pin = pod("forgotten")?;
    net.call("add", &pin)?;
    ensure!(world.reserved()? == 1, "one address is reserved");
    netns::delete(&pin)?;
    fs::remove_dir_all("/var/lib/cni/results")?;
    // The kernel takes the link away a moment after its namespace; until then the pod counts as there.
    testkit::eventually("gc releases the address", 10, || {
        net.call("gc", Path::new("/run/netns/none"))?;
        ensure!(world.reserved()? == 0, "the address is still reserved");
        Ok(())
    })?;
    world.clean()
}
