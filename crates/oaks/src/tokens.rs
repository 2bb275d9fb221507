//! Tokens of managed identities for the metadata service: signed with the key that ARM checks, as ARM's own are.

use reconcile::Client;
use stdx::SharedClock;
use vnet::{Token, TokenFuture, TokenSource};
use vnet_model::instance::IdentitySpec;

use crate::{access::ArmAccess, paths::Paths};

/// Reads key and tenant at each request: both may be new after `oaks server` was started anew, and a token is asked for
/// once an hour.
pub struct IdentityTokens {
    pub home: Client,
    pub paths: Paths,
    pub clock: SharedClock,
}

impl TokenSource for IdentityTokens {
    fn token<'a>(&'a self, identity: &'a IdentitySpec, resource: &'a str) -> TokenFuture<'a> {
        Box::pin(async move {
            let fail = |what: &str, e: &dyn std::fmt::Display| {
                tracing::warn!(identity = identity.client_id, error = %e, "no token: {what}");
                format!("the platform could not {what}; ask again")
            };
            // Where the file is, is the operator's business, not the pod's.
            let access =
                ArmAccess::read(&self.paths).map_err(|e| fail("say who issues its tokens", &format!("{e:#}")))?;
            let key = arm::token_key(&self.home).await;
            let key = key.map_err(|e| fail("read its signing key", &stdx::chain(&e)))?;
            let principal = arm::token::ManagedIdentity {
                client_id: &identity.client_id,
                object_id: &identity.object_id,
                resource_id: &identity.resource_id,
            };
            let now = self.clock.now();
            let claims = arm::token::identity_claims(&principal, &access.base_url, &access.tenant, resource, now);
            Ok(Token {
                access_token: key.issue(&claims).map_err(|e| fail("sign the token", &e))?,
                not_before_s: claims.nbf,
                expires_on_s: claims.exp,
            })
        })
    }
}
