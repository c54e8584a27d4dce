{{/* Labels by which workloads find their pods. The argument is the component. */}}
{{- define "orlop.selector" -}}
app.kubernetes.io/name: orlop
app.kubernetes.io/component: {{ . }}
{{- end }}

{{/* Labels of every object. There is no service where Helm does not install it: in deploy/kubernetes. */}}
{{- define "orlop.labels" -}}
app.kubernetes.io/name: orlop
app.kubernetes.io/version: {{ .Chart.AppVersion }}
{{- if .Release.Service }}
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ .Chart.Name }}-{{ .Chart.Version }}
{{- end }}
{{- end }}

{{- define "orlop.image" -}}
{{ .Values.image.repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}
{{- end }}

{{/* The security context of a container that needs nothing but its sockets. */}}
{{- define "orlop.unprivileged" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop: [ALL]
{{- end }}

{{/*
The directories of the node that pools are in, as JSON: {"directories": [...]}.
Those below the state directory are mounted anyway, and so is /dev. Arguments:
the pools and the state directory.
*/}}
{{- define "orlop.poolDirectories" -}}
{{- $directories := list }}
{{- range .pools }}
{{- $directory := "" }}
{{- if hasKey .source "file" }}
{{- $directory = dir .source.file.path }}
{{- else if hasKey .source "directory" }}
{{- $directory = clean .source.directory }}
{{- end }}
{{- if and $directory (ne $directory $.stateDir) (not (hasPrefix (printf "%s/" $.stateDir) $directory)) }}
{{- $directories = append $directories $directory }}
{{- end }}
{{- end }}
{{- dict "directories" ($directories | uniq | sortAlpha) | toJson }}
{{- end }}

{{/* Arguments that all sidecars have. The argument is the port of metrics and health. */}}
{{- define "orlop.sidecarArgs" -}}
- --csi-address=/run/orlop/csi.sock
- --leader-election
- --leader-election-namespace=$(NAMESPACE)
- --http-endpoint=:{{ . }}
- --kube-api-qps=50
- --kube-api-burst=100
- --retry-interval-max=1m
{{- end }}

{{/* The rest of a sidecar's container. Arguments: port and resources. */}}
{{- define "orlop.sidecarRest" -}}
ports:
- {name: {{ .name }}, containerPort: {{ .port }}}
livenessProbe:
  httpGet: {path: /healthz/leader-election, port: {{ .name }}}
  initialDelaySeconds: 10
  periodSeconds: 20
  timeoutSeconds: 10
  failureThreshold: 3
resources:
  {{- toYaml .resources | nindent 2 }}
securityContext:
  {{- include "orlop.unprivileged" . | nindent 2 }}
volumeMounts:
- {name: socket, mountPath: /run/orlop}
{{- end }}
