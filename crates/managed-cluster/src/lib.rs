//! AKS itself: cluster lifecycle, agent pools, credentials, LoadBalancer Services.
