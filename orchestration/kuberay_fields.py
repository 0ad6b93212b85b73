"""The fields of the Kubernetes objects that `softgrpo kuberay render` and the overlays of `configs/kuberay/` use.

The notation is that of `kuberay_schema.compile_node`: a word is a type, `!` marks a required key, `@1.7` the KubeRay
release that introduced it (an upper bound for fields that v1.7.0 has and v1.5.2 has not).
"""

from __future__ import annotations

from typing import Any

METADATA = {
    "name": "string",
    "namespace": "string",
    "labels": "{string}",
    "annotations": "{string}",
}
SECURITY_CONTEXT = {
    "allowPrivilegeEscalation": "boolean",
    "capabilities": {"add": ["string"], "drop": ["string"]},
    "privileged": "boolean",
    "readOnlyRootFilesystem": "boolean",
    "runAsGroup": "integer",
    "runAsNonRoot": "boolean",
    "runAsUser": "integer",
    "seccompProfile": {"type!": "string"},
}
POD_SECURITY_CONTEXT = {
    "fsGroup": "integer",
    "fsGroupChangePolicy": "string",
    "runAsGroup": "integer",
    "runAsNonRoot": "boolean",
    "runAsUser": "integer",
    "seccompProfile": {"type!": "string"},
    "supplementalGroups": ["integer"],
}
KEY_OF = {"key!": "string", "name": "string", "optional": "boolean"}
ENV = [
    {
        "name!": "string",
        "value": "string",
        "valueFrom": {"secretKeyRef": KEY_OF, "configMapKeyRef": KEY_OF, "fieldRef": {"fieldPath!": "string"}},
    }
]
ENV_FROM = [
    {
        "prefix": "string",
        "secretRef": {"name": "string", "optional": "boolean"},
        "configMapRef": {"name": "string", "optional": "boolean"},
    }
]
RESOURCES = {"limits": "{quantity}", "requests": "{quantity}"}
MOUNTS = [{"name!": "string", "mountPath!": "string", "readOnly": "boolean", "subPath": "string"}]
PROBE = {
    "exec": {"command": ["string"]},
    "httpGet": {"path": "string", "port!": "port", "scheme": "string"},
    "failureThreshold": "integer",
    "initialDelaySeconds": "integer",
    "periodSeconds": "integer",
    "successThreshold": "integer",
    "timeoutSeconds": "integer",
}
CONTAINER = {
    "name!": "string",
    "image": "string",
    "imagePullPolicy": "string",
    "command": ["string"],
    "args": ["string"],
    "env": ENV,
    "envFrom": ENV_FROM,
    "ports": [{"name": "string", "containerPort!": "integer", "protocol": "string"}],
    "resources": RESOURCES,
    "lifecycle": {"preStop": {"exec": {"command": ["string"]}}},
    "livenessProbe": PROBE,
    "readinessProbe": PROBE,
    "startupProbe": PROBE,
    "securityContext": SECURITY_CONTEXT,
    "volumeMounts": MOUNTS,
    "workingDir": "string",
}
NODE_TERM = {"matchExpressions": [{"key!": "string", "operator!": "string", "values": ["string"]}]}
LABEL_SELECTOR = {
    "matchLabels": "{string}",
    "matchExpressions": [{"key!": "string", "operator!": "string", "values": ["string"]}],
}
POD_TERM = {
    "labelSelector": LABEL_SELECTOR,
    "topologyKey!": "string",
    "namespaces": ["string"],
}
POD_SPEC = {
    "containers!": [CONTAINER],
    "initContainers": [CONTAINER],
    "volumes": [
        {
            "name!": "string",
            "configMap": {"name": "string", "defaultMode": "integer", "optional": "boolean"},
            "secret": {"secretName": "string", "defaultMode": "integer", "optional": "boolean"},
            "persistentVolumeClaim": {"claimName!": "string", "readOnly": "boolean"},
            "emptyDir": {"medium": "string", "sizeLimit": "quantity"},
            "hostPath": {"path!": "string", "type": "string"},
        }
    ],
    "affinity": {
        "nodeAffinity": {
            "preferredDuringSchedulingIgnoredDuringExecution": [{"weight!": "integer", "preference!": NODE_TERM}],
            "requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms!": [NODE_TERM]},
        },
        "podAffinity": {
            "preferredDuringSchedulingIgnoredDuringExecution": [{"weight!": "integer", "podAffinityTerm!": POD_TERM}],
            "requiredDuringSchedulingIgnoredDuringExecution": [POD_TERM],
        },
        "podAntiAffinity": {
            "preferredDuringSchedulingIgnoredDuringExecution": [{"weight!": "integer", "podAffinityTerm!": POD_TERM}],
            "requiredDuringSchedulingIgnoredDuringExecution": [POD_TERM],
        },
    },
    "automountServiceAccountToken": "boolean",
    "enableServiceLinks": "boolean",
    "imagePullSecrets": [{"name": "string"}],
    "nodeSelector": "{string}",
    "priorityClassName": "string",
    "restartPolicy": "string",
    "runtimeClassName": "string",
    "securityContext": POD_SECURITY_CONTEXT,
    "serviceAccountName": "string",
    "terminationGracePeriodSeconds": "integer",
    "tolerations": [
        {
            "key": "string",
            "operator": "string",
            "value": "string",
            "effect": "string",
            "tolerationSeconds": "integer",
        }
    ],
}
POD_TEMPLATE = {"metadata": METADATA, "spec": POD_SPEC}
RAY_CLUSTER_SPEC = {
    "rayVersion": "string",
    "suspend": "boolean",
    "managedBy": "string",
    "authOptions": {"mode": "disabled|token", "enableK8sTokenAuth@1.7": "boolean", "secretName@1.7": "string"},
    "enableInTreeAutoscaling": "boolean",
    "autoscalerOptions": {
        "version": "v1|v2",
        "idleTimeoutSeconds": "integer",
        "upscalingMode": "Default|Aggressive|Conservative",
        "image": "string",
        "imagePullPolicy": "string",
        "env": ENV,
        "envFrom": ENV_FROM,
        "resources": RESOURCES,
        "securityContext": SECURITY_CONTEXT,
        "volumeMounts": MOUNTS,
    },
    "gcsFaultToleranceOptions": {
        "redisAddress": "string",
        "redisUsername": {"value": "string", "valueFrom": {"secretKeyRef": KEY_OF}},
        "redisPassword": {"value": "string", "valueFrom": {"secretKeyRef": KEY_OF}},
        "externalStorageNamespace": "string",
    },
    "headServiceAnnotations": "{string}",
    "upgradeStrategy@1.6": {"type": "Recreate|None"},
    "headGroupSpec!": {
        "rayStartParams": "{string}",
        "labels": "{string}",
        "resources": "{string}",
        "serviceType": "string",
        "enableIngress": "boolean",
        "template!": POD_TEMPLATE,
    },
    "workerGroupSpecs": [
        {
            "groupName!": "string",
            "replicas": "integer",
            "minReplicas!": "integer",
            "maxReplicas!": "integer",
            "numOfHosts": "integer",
            "idleTimeoutSeconds": "integer",
            "priority@1.7": "integer",
            "suspend": "boolean",
            "labels": "{string}",
            "resources": "{string}",
            "rayStartParams": "{string}",
            "template!": POD_TEMPLATE,
        }
    ],
}
DELETION_CONDITION = {
    "jobStatus": "SUCCEEDED|FAILED",
    "jobDeploymentStatus@1.7": "Failed",
    "ttlSeconds": "integer",
}
DELETION_POLICY = "DeleteCluster|DeleteWorkers|DeleteSelf|DeleteNone"
RAY_JOB_SPEC = {
    "entrypoint": "string",
    "runtimeEnvYAML": "string",
    "metadata": "{string}",
    "jobId": "string",
    "submissionMode": "string",
    "backoffLimit": "integer",
    "activeDeadlineSeconds": "integer",
    "preRunningDeadlineSeconds@1.6": "integer",
    "shutdownAfterJobFinishes": "boolean",
    "ttlSecondsAfterFinished": "integer",
    "suspend": "boolean",
    "managedBy": "string",
    "clusterSelector": "{string}",
    "entrypointNumCpus": "number",
    "entrypointNumGpus": "number",
    "entrypointResources": "string",
    "deletionStrategy": {
        "onSuccess": {"policy": DELETION_POLICY},
        "onFailure": {"policy": DELETION_POLICY},
        "deletionRules": [{"policy!": DELETION_POLICY, "condition!": DELETION_CONDITION}],
    },
    "submitterPodTemplate": POD_TEMPLATE,
    "submitterConfig": {"backoffLimit": "integer"},
    "rayClusterSpec": RAY_CLUSTER_SPEC,
}
PEER = {
    "podSelector": LABEL_SELECTOR,
    "namespaceSelector": LABEL_SELECTOR,
    "ipBlock": {"cidr!": "string", "except": ["string"]},
}
PORTS = [{"port": "port", "endPort": "integer", "protocol": "string"}]
KINDS: dict[str, tuple[str, Any]] = {
    "RayJob": ("ray.io/v1", {"spec!": RAY_JOB_SPEC}),
    "RayCluster": ("ray.io/v1", {"spec!": RAY_CLUSTER_SPEC}),
    "ConfigMap": ("v1", {"data": "{string}", "immutable": "boolean"}),
    "Secret": ("v1", {"type": "string", "stringData": "{string}", "data": "{string}"}),
    "PersistentVolumeClaim": (
        "v1",
        {
            "spec!": {
                "accessModes": ["ReadWriteOnce|ReadWriteMany|ReadOnlyMany|ReadWriteOncePod"],
                "resources": RESOURCES,
                "storageClassName": "string",
                "volumeName": "string",
                "volumeMode": "string",
            }
        },
    ),
    "NetworkPolicy": (
        "networking.k8s.io/v1",
        {
            "spec!": {
                "podSelector!": LABEL_SELECTOR,
                "policyTypes": ["Ingress|Egress"],
                "ingress": [{"from": [PEER], "ports": PORTS}],
                "egress": [{"to": [PEER], "ports": PORTS}],
            }
        },
    ),
    "PodMonitor": (
        "monitoring.coreos.com/v1",
        {
            "spec!": {
                "selector!": LABEL_SELECTOR,
                "podTargetLabels": ["string"],
                "podMetricsEndpoints": [{"port": "string", "interval": "string", "path": "string"}],
            }
        },
    ),
}
"""Kind -> (apiVersion, fields beside apiVersion, kind and metadata)."""
