//! What every handler needs: home, who may log in, and the waiting for an object to settle.

use std::{sync::Arc, time::Duration};

use async_trait::async_trait;
use reconcile::{Client, Error};
use resources::ArmId;
use serde_json::{Value, json};
use stdx::SharedClock;
use thiserror::Error;
use tokio::time::Instant;

use crate::{
    error::Fault,
    home::{ArmObject, Home, is_terminal},
    token::{ServicePrincipal, TokenError, TokenKey},
    validate::{WORLD_PLURALS, World},
};

/// How long a request waits for the platform before it answers "in progress". Most changes are done by then, and the
/// client then needs no poll at all.
const SETTLE: Duration = Duration::from_millis(1000);
const SETTLE_STEP: Duration = Duration::from_millis(15);

/// What the front door cannot answer from home objects.
#[async_trait]
pub trait Actions: Send + Sync {
    /// A kubeconfig (YAML) for the cluster with this ARM id; `admin` for the local administrator.
    /// # Errors: the cluster has no control plane yet, or it does not answer.
    async fn cluster_credentials(&self, id: &str, admin: bool) -> Result<String, ActionError>;
}

/// Why an action failed, in words for the client.
#[derive(Debug, Error)]
#[error("{message}")]
pub struct ActionError {
    /// ARM's code, for example `OperationNotAllowed`.
    pub code: String,
    pub message: String,
}

/// Who this platform is.
#[derive(Clone, Debug)]
pub struct Identity {
    /// `https://host:port`, as clients reach it, without a trailing slash.
    pub base_url: String,
    /// GUID of the one subscription, and its display name.
    pub subscription: String,
    pub subscription_name: String,
    pub service_principal: ServicePrincipal,
}

pub(crate) struct App {
    pub home: Home,
    pub identity: Identity,
    pub key: TokenKey,
    pub actions: Arc<dyn Actions>,
    pub clock: SharedClock,
    pub public_pool: Option<ipnet::IpNet>,
    pub service_tags: vnet_model::service_tags::ServiceTags,
}

/// Where an object is after waiting for it.
pub(crate) enum Settled {
    Gone,
    /// In a terminal state that has seen the generation.
    Done(ArmObject),
    Running(ArmObject),
}

impl App {
    /// Waits up to [`SETTLE`] for the object of this uid to reach a terminal state for `generation`, or to be gone.
    pub async fn settle(&self, plural: &str, name: &str, uid: &str, generation: i64) -> Result<Settled, Error> {
        let deadline = Instant::now() + SETTLE;
        loop {
            let now = self.look(plural, name, uid, generation).await?;
            if !matches!(now, Settled::Running(_)) || Instant::now() >= deadline {
                return Ok(now);
            }
            tokio::time::sleep(SETTLE_STEP).await;
        }
    }

    /// The same without waiting.
    pub async fn look(&self, plural: &str, name: &str, uid: &str, generation: i64) -> Result<Settled, Error> {
        let Some(object) = self.home.get::<ArmObject>(plural, name).await? else {
            return Ok(Settled::Gone);
        };
        if object.uid() != uid {
            return Ok(Settled::Gone);
        }
        let seen = object
            .status
            .as_ref()
            .is_some_and(|s| s.observed_generation >= generation);
        if seen && is_terminal(object.state()) {
            Ok(Settled::Done(object))
        } else {
            Ok(Settled::Running(object))
        }
    }

    pub async fn world(&self) -> Result<World, Error> {
        let [
            vnets,
            nics,
            clusters,
            security_groups,
            route_tables,
            public_ips,
            public_ip_prefixes,
            load_balancers,
            nat_gateways,
            application_groups,
            private_zones,
        ] = WORLD_PLURALS;
        Ok(World {
            vnets: self.home.list(vnets).await?,
            nics: self.home.list(nics).await?,
            clusters: self.home.list(clusters).await?,
            security_groups: self.home.list(security_groups).await?,
            route_tables: self.home.list(route_tables).await?,
            public_ips: self.home.list(public_ips).await?,
            public_ip_prefixes: self.home.list(public_ip_prefixes).await?,
            load_balancers: self.home.list(load_balancers).await?,
            nat_gateways: self.home.list(nat_gateways).await?,
            application_groups: self.home.list(application_groups).await?,
            private_zones: self.home.list(private_zones).await?,
            public_pool: self.public_pool,
            service_tags: self.service_tags.clone(),
        })
    }

    /// The group that a resource lies in.
    /// # Errors: `ResourceGroupNotFound`; 409 if the group is being deleted and `for_write`.
    pub async fn group_of(&self, id: &ArmId, for_write: bool) -> Result<ArmObject, Fault> {
        let name = id.resource_group.as_deref().unwrap_or_default();
        let group_id = resources::group_id(&id.subscription, name);
        let group = self.home.object("resourcegroups", &group_id).await?;
        let group = group.ok_or_else(|| Fault::group_not_found(name))?;
        if for_write && group.is_deleting() {
            let message = format!("The resource group '{name}' is being deleted, so nothing can be created in it.");
            return Err(Fault::conflict("ResourceGroupBeingDeleted", message));
        }
        Ok(group)
    }

    /// Subscription ids compare without regard to case; there is one.
    pub fn check_subscription(&self, id: &str) -> Result<(), Fault> {
        if id.eq_ignore_ascii_case(&self.identity.subscription) {
            return Ok(());
        }
        let message = format!(
            "The subscription '{id}' could not be found. This platform's is {}.",
            self.identity.subscription
        );
        Err(Fault::not_found("SubscriptionNotFound", message))
    }
}

const TOKEN_SECRET: &str = "/api/v1/namespaces/kube-system/secrets";
const TOKEN_SECRET_NAME: &str = "oaks-arm-token-key";

/// The key that signs tokens: read from home, made there at the first start.
pub async fn token_key(client: &Client) -> Result<TokenKey, StartError> {
    let path = format!("{TOKEN_SECRET}/{TOKEN_SECRET_NAME}");
    // Bounded: a second server may create it between the read and the write.
    for _ in 0..3 {
        match client.request::<Value, Value>(http::Method::GET, &path, None).await {
            Ok(secret) => {
                let text = secret["data"]["key"].as_str().unwrap_or_default();
                let der = base64::Engine::decode(&base64::engine::general_purpose::STANDARD, text);
                return Ok(TokenKey::from_pkcs8(
                    &der.map_err(|_| StartError::Key(TokenError::Key))?,
                )?);
            }
            Err(e) if e.is_not_found() => {}
            Err(source) => return Err(StartError::Home { source }),
        }
        let der = TokenKey::generate()?;
        let text = base64::Engine::encode(&base64::engine::general_purpose::STANDARD, der);
        let secret = json!({"apiVersion": "v1", "kind": "Secret", "type": "Opaque",
            "metadata": {"name": TOKEN_SECRET_NAME, "namespace": "kube-system"}, "data": {"key": text}});
        match client
            .request::<Value, Value>(http::Method::POST, TOKEN_SECRET, Some(&secret))
            .await
        {
            Ok(_) => {}
            Err(e) if e.is_already_exists() => {}
            Err(source) => return Err(StartError::Home { source }),
        }
    }
    Err(StartError::Key(TokenError::Key))
}

/// Why the server did not start.
#[derive(Debug, Error)]
pub enum StartError {
    #[error("the token key in home cannot be used")]
    Key(#[from] TokenError),
    #[error("home did not give the token key")]
    Home {
        #[source]
        source: Error,
    },
    #[error("the certificate for {base_url} cannot be used: {problem}")]
    Certificate { base_url: String, problem: String },
    #[error("the listener's address cannot be read")]
    Listener(#[source] std::io::Error),
}
