//! The command line: flags, the config file that mirrors them, and the dispatch to the verbs.

use std::{io::Read as _, net::SocketAddr, path::PathBuf, process::ExitCode};

use anyhow::{Context as _, Result};
use clap::{Args, Parser, Subcommand, ValueEnum};
use serde::Deserialize;
use vnet_model::service_tags::ServiceTags;

use crate::paths::Paths;

#[derive(Debug, Parser)]
#[command(
    name = "oaks",
    version,
    about = "Azure Kubernetes Service, virtual nodes and virtual networks on machines you own"
)]
pub struct Cli {
    #[command(flatten)]
    pub global: Global,
    #[command(subcommand)]
    pub verb: Verb,
}

#[derive(Clone, Debug, Args)]
pub struct Global {
    /// Name of the instance: prefixes links, tables, cgroups and folders (letters, digits and '-', at most 9 characters).
    #[arg(long, global = true, env = "OAKS_INSTANCE")]
    pub instance: Option<String>,
    /// Folder for everything that survives a reboot [default: /var/lib/<instance>].
    #[arg(long, global = true, env = "OAKS_DATA_DIR")]
    pub data_dir: Option<PathBuf>,
    /// Folder for pids, sockets and pinned namespaces [default: /run/<instance>].
    #[arg(long, global = true, env = "OAKS_RUN_DIR")]
    pub run_dir: Option<PathBuf>,
    /// YAML file that mirrors the flags of `up` (flag > environment > file); unknown keys are errors.
    #[arg(long, global = true, env = "OAKS_CONFIG")]
    pub config: Option<PathBuf>,
}

#[derive(Debug, Subcommand)]
pub enum Verb {
    /// Start the platform on this machine; ends when it is ready.
    Up(UpArgs),
    /// Stop everything of the instance and leave the host as it was.
    Down {
        /// Also delete the data folder.
        #[arg(long)]
        purge: bool,
    },
    /// What runs, and whether it is healthy.
    Status {
        #[arg(short, long, value_enum, default_value_t = Output::Table)]
        output: Output,
    },
    /// Check the host: what is missing, what is in the way, what to do about it.
    Doctor {
        #[arg(short, long, value_enum, default_value_t = Output::Table)]
        output: Output,
    },
    /// The user's kubeconfig.
    #[command(subcommand)]
    Kubeconfig(KubeconfigVerb),
    /// Images of the host's store.
    #[command(subcommand)]
    Image(ImageVerb),
    /// Prepare the unmodified az CLI: writes the cloud file and CA bundle, prints the exports and the login.
    Az {
        /// Only print the exports.
        #[arg(long)]
        print: bool,
    },
    /// Build the demo images, create the demo cluster through the ARM API, run the application and prove it by traffic.
    Demo {
        /// Folder with the image recipes and manifests.
        #[arg(long, default_value = "demo")]
        dir: PathBuf,
        /// Report every proof as one JSON object per line.
        #[arg(long)]
        json: bool,
    },
    /// Measure the running instance: clusters, pods, memory; in a resource group of its own.
    Bench {
        /// Folder with the image recipe that the pods run.
        #[arg(long, default_value = "demo/store")]
        image: PathBuf,
        /// One JSON object per line.
        #[arg(long)]
        json: bool,
    },
    /// The data plane of this host.
    #[command(subcommand)]
    Vnet(VnetVerb),
    /// Run the API server, controllers and ARM in the foreground (started by `up`).
    Server(UpArgs),
    /// Run the host agent in the foreground (started by `up`), or add machines to the platform.
    #[command(args_conflicts_with_subcommands = true)]
    Host {
        #[command(flatten)]
        args: UpArgs,
        #[command(subcommand)]
        verb: Option<HostVerb>,
    },
    /// Start server and host agent again when they end (started by `up`).
    #[command(hide = true)]
    Keeper(UpArgs),
    /// Run a node inside a machine (started by its init).
    #[command(hide = true)]
    Node {
        #[arg(long)]
        config: PathBuf,
    },
    /// Boot a machine from a description on standard input (started by the host agent).
    #[command(hide = true)]
    MachineBoot,
}

#[derive(Clone, Debug, Default, Args)]
pub struct UpArgs {
    /// Where the home cluster's API answers.
    #[arg(long, env = "OAKS_API_LISTEN")]
    pub api_listen: Option<SocketAddr>,
    /// Where ARM answers (az, SDKs).
    #[arg(long, env = "OAKS_ARM_LISTEN")]
    pub arm_listen: Option<SocketAddr>,
    /// Public pool: addresses of LoadBalancers and API servers, routed on this host only.
    #[arg(long, env = "OAKS_PUBLIC_POOL")]
    pub public_pool: Option<String>,
    /// Link that pods reach the outside through: `auto`, `none`, or a name.
    #[arg(long, env = "OAKS_UPLINK")]
    pub uplink: Option<String>,
    /// Addresses that a service tag stands for in security rules, NAME=PREFIX[,PREFIX...]; may be given several times.
    #[arg(long, env = "OAKS_SERVICE_TAGS", value_delimiter = ';')]
    pub service_tag: Vec<String>,
    /// Write an audit log per cluster by this policy (`audit.k8s.io/v1`, YAML); `default` for one that shows no secrets.
    #[arg(long, env = "OAKS_AUDIT_POLICY")]
    pub audit_policy: Option<String>,
    /// Folder for the keys that encrypt secrets at rest, outside the data folder [default: with the clusters' other keys].
    #[arg(long, env = "OAKS_KEYS_DIR")]
    pub keys_dir: Option<PathBuf>,
    /// IPv4 address of this machine that other hosts reach it at: lets them join (`oaks host token`).
    #[arg(long, env = "OAKS_UNDERLAY")]
    pub underlay: Option<std::net::Ipv4Addr>,
    /// This host's name among others [default: the machine's].
    #[arg(long, env = "OAKS_HOST_NAME")]
    pub host_name: Option<String>,
    /// Keep all clusters' objects in this etcd (3.4 or newer) instead of the data folder; URLs of its members, with commas.
    #[arg(long, env = "OAKS_ETCD", value_delimiter = ',')]
    pub etcd: Vec<String>,
    /// What all keys in etcd start with; each platform on one etcd needs its own [default: /<instance>/].
    #[arg(long, env = "OAKS_ETCD_PREFIX")]
    pub etcd_prefix: Option<String>,
    /// CA certificate (PEM) of an etcd at https URLs.
    #[arg(long, env = "OAKS_ETCD_CACERT")]
    pub etcd_cacert: Option<PathBuf>,
    /// Client certificate (PEM) for etcd.
    #[arg(long, env = "OAKS_ETCD_CERT", requires = "etcd_key")]
    pub etcd_cert: Option<PathBuf>,
    /// Key (PEM) of the client certificate.
    #[arg(long, env = "OAKS_ETCD_KEY", requires = "etcd_cert")]
    pub etcd_key: Option<PathBuf>,
    /// Folder with oaks-init, oaks-runc, azure-vnet and azure-vnet-ipam [default: beside this program].
    #[arg(long, env = "OAKS_LIBEXEC")]
    pub libexec: Option<PathBuf>,
}

#[derive(Debug, Subcommand)]
pub enum HostVerb {
    /// Let another machine join this platform: prints the command to run there.
    Token {
        /// Name of the host; it may join again under the same name.
        name: String,
        /// How long the token may be used, for example 30m or 2h.
        #[arg(long, default_value = "1h", value_parser = seconds)]
        ttl: u64,
    },
    /// Make this machine a host of another one's platform.
    Join {
        /// IPv4 address of this machine that the platform's other hosts reach it at.
        #[arg(long)]
        underlay: std::net::Ipv4Addr,
        /// Link that pods here reach the outside through: `auto`, `none`, or a name.
        #[arg(long, env = "OAKS_UPLINK")]
        uplink: Option<String>,
        /// Folder with oaks-init, oaks-runc, azure-vnet and azure-vnet-ipam [default: beside this program].
        #[arg(long, env = "OAKS_LIBEXEC")]
        libexec: Option<PathBuf>,
        /// What `oaks host token` printed.
        token: String,
    },
}

/// `90s`, `30m`, `2h`, or a number of seconds.
fn seconds(text: &str) -> Result<u64, String> {
    let (number, unit) = match text.find(|c: char| !c.is_ascii_digit()) {
        Some(at) => text.split_at(at),
        None => (text, "s"),
    };
    let factor = match unit {
        "s" => 1,
        "m" => 60,
        "h" => 3600,
        _ => return Err(format!("{text:?} is no time; use for example 30m or 2h")),
    };
    let number: u64 = number.parse().map_err(|_| format!("{text:?} is no time"))?;
    number
        .checked_mul(factor)
        .ok_or_else(|| format!("{text:?} is too long"))
}

#[derive(Debug, Subcommand)]
pub enum KubeconfigVerb {
    /// Merge the context NAME (a cluster, or `oaks-home`) into the user's file and switch to it.
    Save {
        name: String,
        /// Resource group, if several clusters have the name.
        #[arg(short = 'g', long)]
        resource_group: Option<String>,
        /// Replace a context of that name that Oaks did not write.
        #[arg(long)]
        overwrite: bool,
    },
    /// Print it instead.
    Show {
        name: String,
        #[arg(short = 'g', long)]
        resource_group: Option<String>,
    },
    /// Take it out of the user's file again.
    Remove { name: String },
}

#[derive(Debug, Subcommand)]
pub enum VnetVerb {
    /// What differs between the objects in home and the kernel, per network; changes nothing. Exit code 0: nothing, 1:
    /// differences, 2: an error.
    Diff {
        #[arg(short, long, value_enum, default_value_t = Output::Table)]
        output: Output,
    },
}

#[derive(Debug, Subcommand)]
pub enum ImageVerb {
    /// Build an image from a folder with an image.yaml (Debian packages and files), offline.
    Build { dir: PathBuf },
    /// Load an OCI or docker archive.
    Load { archive: PathBuf },
    /// List the images that every machine and container group can run.
    List {
        #[arg(short, long, value_enum, default_value_t = Output::Table)]
        output: Output,
    },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Output {
    Table,
    Json,
}

/// Settings in force: flag, else environment, else file, else default.
#[derive(Clone, Debug)]
pub struct Settings {
    pub paths: Paths,
    pub api_listen: SocketAddr,
    pub arm_listen: SocketAddr,
    pub public_pool: ipnet::Ipv4Net,
    pub uplink: String,
    /// As configured, without `AzureCloud`.
    pub service_tags: ServiceTags,
    /// Without one the host stands alone.
    pub underlay: Option<std::net::Ipv4Addr>,
    pub host_name: Option<String>,
    pub libexec: Option<PathBuf>,
    /// Where the keys that seal secrets live, if not with the others.
    pub keys_dir: Option<PathBuf>,
    /// Audit policy in force, as given (`default` or a path) and as read.
    pub audit_policy: Option<(String, apiserver::audit::Policy)>,
    pub etcd: Option<EtcdSettings>,
}

/// An etcd that holds the objects.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EtcdSettings {
    pub endpoints: Vec<String>,
    pub prefix: String,
    pub cacert: Option<PathBuf>,
    /// Client certificate and key.
    pub identity: Option<(PathBuf, PathBuf)>,
}

/// The config file: the same names as the flags.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
struct File {
    instance: Option<String>,
    data_dir: Option<PathBuf>,
    run_dir: Option<PathBuf>,
    api_listen: Option<SocketAddr>,
    arm_listen: Option<SocketAddr>,
    public_pool: Option<String>,
    uplink: Option<String>,
    service_tag: Vec<String>,
    underlay: Option<std::net::Ipv4Addr>,
    host_name: Option<String>,
    libexec: Option<PathBuf>,
    audit_policy: Option<String>,
    keys_dir: Option<PathBuf>,
    etcd: Vec<String>,
    etcd_prefix: Option<String>,
    etcd_cacert: Option<PathBuf>,
    etcd_cert: Option<PathBuf>,
    etcd_key: Option<PathBuf>,
}

impl File {
    fn etcd(&self, args: Option<&UpArgs>, instance: &str) -> Result<Option<EtcdSettings>> {
        let given = args.map(|a| &a.etcd).filter(|e| !e.is_empty());
        let endpoints = given.unwrap_or(&self.etcd).clone();
        if endpoints.is_empty() {
            return Ok(None);
        }
        for url in &endpoints {
            anyhow::ensure!(
                url.starts_with("http://") || url.starts_with("https://"),
                "--etcd {url:?} is not a URL such as http://127.0.0.1:2379"
            );
        }
        let path = |given: fn(&UpArgs) -> &Option<PathBuf>, file: &Option<PathBuf>| {
            let chosen = args.and_then(|a| given(a).clone()).or_else(|| file.clone());
            chosen.map(absolute).transpose()
        };
        let prefix = args
            .and_then(|a| a.etcd_prefix.clone())
            .or_else(|| self.etcd_prefix.clone());
        let certificate = path(|a| &a.etcd_cert, &self.etcd_cert)?;
        let identity = match (certificate, path(|a| &a.etcd_key, &self.etcd_key)?) {
            (Some(certificate), Some(key)) => Some((certificate, key)),
            (None, None) => None,
            _ => anyhow::bail!("etcd-cert and etcd-key go together"),
        };
        Ok(Some(EtcdSettings {
            endpoints,
            prefix: prefix.unwrap_or_else(|| format!("/{instance}/")),
            cacert: path(|a| &a.etcd_cacert, &self.etcd_cacert)?,
            identity,
        }))
    }
}

impl Settings {
    fn new(global: &Global, args: Option<&UpArgs>) -> Result<Self> {
        let file = match &global.config {
            None => File::default(),
            Some(path) => {
                let text = std::fs::read_to_string(path).with_context(|| format!("reading {}", path.display()))?;
                serde_saphyr::from_str(&text).with_context(|| format!("{} is not a config file", path.display()))?
            }
        };
        let instance = global
            .instance
            .clone()
            .or_else(|| file.instance.clone())
            .unwrap_or_else(|| "oaks".to_owned());
        let fits = !instance.is_empty()
            && instance.len() <= 9
            && instance
                .chars()
                .all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-')
            && instance.starts_with(|c: char| c.is_ascii_lowercase());
        anyhow::ensure!(
            fits,
            "--instance {instance:?}: use 1 to 9 lower-case letters, digits and '-', a letter first (link names are short)"
        );
        let etcd = file.etcd(args, &instance)?;
        let data = global.data_dir.clone().or(file.data_dir).map(absolute).transpose()?;
        let run = global.run_dir.clone().or(file.run_dir).map(absolute).transpose()?;
        let pool = args
            .and_then(|a| a.public_pool.clone())
            .or(file.public_pool)
            .unwrap_or_else(|| "198.19.0.0/16".to_owned());
        let public_pool: ipnet::Ipv4Net = pool
            .parse()
            .with_context(|| format!("--public-pool {pool:?} is not an IPv4 prefix"))?;
        anyhow::ensure!(
            public_pool.prefix_len() <= 28,
            "--public-pool {public_pool} is too small: a /28 is the minimum"
        );
        let given = args.map(|a| &a.service_tag).filter(|t| !t.is_empty());
        let tags = given.unwrap_or(&file.service_tag).iter().map(String::as_str);
        let service_tags = ServiceTags::parse(tags).context("--service-tag")?;
        let audit_policy = args.and_then(|a| a.audit_policy.clone()).or(file.audit_policy);
        let audit_policy = audit_policy.map(read_policy).transpose().context("--audit-policy")?;
        let host_name = args.and_then(|a| a.host_name.clone()).or(file.host_name);
        host_name
            .as_deref()
            .map_or(Ok(()), crate::hosts::check_name)
            .context("--host-name")?;
        Ok(Self {
            underlay: args.and_then(|a| a.underlay).or(file.underlay),
            host_name,
            audit_policy,
            keys_dir: args
                .and_then(|a| a.keys_dir.clone())
                .or(file.keys_dir)
                .map(absolute)
                .transpose()?,
            etcd,
            service_tags,
            paths: Paths::new(&instance, data.as_deref(), run.as_deref()),
            api_listen: args
                .and_then(|a| a.api_listen)
                .or(file.api_listen)
                .unwrap_or(SocketAddr::from(([127, 0, 0, 1], 6443))),
            arm_listen: args
                .and_then(|a| a.arm_listen)
                .or(file.arm_listen)
                .unwrap_or(SocketAddr::from(([127, 0, 0, 1], 8443))),
            public_pool: public_pool.trunc(),
            uplink: args
                .and_then(|a| a.uplink.clone())
                .or(file.uplink)
                .unwrap_or_else(|| "auto".to_owned()),
            libexec: args
                .and_then(|a| a.libexec.clone())
                .or(file.libexec)
                .map(absolute)
                .transpose()?,
        })
    }

    /// The flags that make another process of this instance see the same settings.
    pub fn as_args(&self, verb: &str) -> Vec<String> {
        let mut out = vec![
            verb.to_owned(),
            format!("--instance={}", self.paths.instance),
            format!("--data-dir={}", self.paths.data.display()),
            format!("--run-dir={}", self.paths.run.display()),
            format!("--api-listen={}", self.api_listen),
            format!("--arm-listen={}", self.arm_listen),
            format!("--public-pool={}", self.public_pool),
            format!("--uplink={}", self.uplink),
        ];
        out.extend(self.service_tags.as_texts().map(|t| format!("--service-tag={t}")));
        out.extend(
            self.audit_policy
                .iter()
                .map(|(given, _)| format!("--audit-policy={given}")),
        );
        out.extend(self.keys_dir.iter().map(|d| format!("--keys-dir={}", d.display())));
        out.extend(self.underlay.iter().map(|u| format!("--underlay={u}")));
        out.extend(self.host_name.iter().map(|n| format!("--host-name={n}")));
        if let Some(etcd) = &self.etcd {
            out.push(format!("--etcd={}", etcd.endpoints.join(",")));
            out.push(format!("--etcd-prefix={}", etcd.prefix));
            out.extend(etcd.cacert.iter().map(|p| format!("--etcd-cacert={}", p.display())));
            if let Some((certificate, key)) = &etcd.identity {
                out.push(format!("--etcd-cert={}", certificate.display()));
                out.push(format!("--etcd-key={}", key.display()));
            }
        }
        out.extend(self.libexec.iter().map(|l| format!("--libexec={}", l.display())));
        out
    }
}

/// Reads an audit policy; a path becomes absolute, so that every process of the instance finds it.
fn read_policy(given: String) -> Result<(String, apiserver::audit::Policy)> {
    use apiserver::audit::{DEFAULT_POLICY, Policy};
    if given == "default" {
        return Ok((given, Policy::parse(DEFAULT_POLICY)?));
    }
    let path = absolute(PathBuf::from(given))?;
    let text = std::fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))?;
    let policy = Policy::parse(&text).with_context(|| path.display().to_string())?;
    Ok((path.display().to_string(), policy))
}

fn absolute(path: PathBuf) -> Result<PathBuf> {
    std::path::absolute(&path).with_context(|| format!("{} has no absolute form", path.display()))
}

/// Parses the command line and runs the verb.
pub fn run() -> Result<ExitCode> {
    let cli = Cli::parse();
    let settings = |args: Option<&UpArgs>| Settings::new(&cli.global, args);
    let done = match &cli.verb {
        Verb::Vnet(VnetVerb::Diff { output }) => {
            return block_on(async { Ok(crate::vnet_verbs::diff(&settings(None)?.paths, *output).await) });
        }
        Verb::Up(args) => crate::up::run(&settings(Some(args))?),
        Verb::Down { purge } => crate::down::run(&settings(None)?.paths, *purge),
        Verb::Status { output } => crate::status::run(&settings(None)?, *output),
        Verb::Doctor { output } => crate::doctor::run(&settings(None)?, *output),
        Verb::Kubeconfig(verb) => block_on(crate::kubeconfig_verbs::run(&settings(None)?, verb)),
        Verb::Image(ImageVerb::Build { dir }) => {
            let image = block_on(crate::image::build(&settings(None)?, dir))?;
            println!("built {} {}", image.id, image.tags.join(" "));
            Ok(())
        }
        Verb::Image(ImageVerb::Load { archive }) => crate::image::load(&settings(None)?, archive),
        Verb::Image(ImageVerb::List { output }) => crate::image::list(&settings(None)?, *output),
        Verb::Az { print } => crate::az::run(&settings(None)?, *print),
        Verb::Demo { dir, json } => block_on(crate::demo::run(&settings(None)?, dir, *json)),
        Verb::Bench { image, json } => block_on(crate::bench::run(&settings(None)?, image, *json)),
        Verb::Server(args) => service(crate::server::run(&settings(Some(args))?)),
        Verb::Host { args, verb: None } => service(crate::host::run(&settings(Some(args))?)),
        Verb::Host {
            verb: Some(HostVerb::Token { name, ttl }),
            ..
        } => block_on(crate::hosts::token(&settings(None)?, name, *ttl)),
        Verb::Host {
            verb:
                Some(HostVerb::Join {
                    underlay,
                    uplink,
                    libexec,
                    token,
                }),
            ..
        } => {
            let args = UpArgs {
                uplink: uplink.clone(),
                libexec: libexec.clone(),
                ..UpArgs::default()
            };
            crate::hosts::join(&settings(Some(&args))?, *underlay, token)
        }
        Verb::Keeper(args) => crate::keeper::run(&settings(Some(args))?),
        Verb::Node { config } => service(crate::node::run(config)),
        Verb::MachineBoot => machine_boot(),
    };
    done.map(|()| ExitCode::SUCCESS)
}

/// A verb of a user: one thread is enough.
fn block_on<T>(work: impl Future<Output = Result<T>>) -> Result<T> {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?
        .block_on(work)
}

/// A long-running process: logs to standard error, all cores.
fn service(work: impl Future<Output = Result<()>>) -> Result<()> {
    let filter = tracing_subscriber::EnvFilter::try_from_env("OAKS_LOG").unwrap_or_else(|_| "info".into());
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_ansi(false)
        .with_writer(std::io::stderr)
        .init();
    // One provider in the process: libraries that ask for the default one must find ring.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let done = runtime.block_on(work);
    // Blocking calls that still wait (a poll, a dial) must not hold up the end.
    runtime.shutdown_background();
    done
}

fn machine_boot() -> Result<()> {
    let mut text = String::new();
    std::io::stdin()
        .read_to_string(&mut text)
        .context("reading the machine's description")?;
    let spec: machines::namespace::BootSpec = serde_json::from_str(&text).context("the machine's description")?;
    let pid = machines::namespace::boot(&spec).map_err(|e| anyhow::anyhow!(stdx::chain(&e).to_string()))?;
    println!("{pid}");
    Ok(())
}
