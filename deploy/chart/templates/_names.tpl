{{- define "rafs.name" -}}{{ .Release.Name | trunc 40 | trimSuffix "-" }}{{- end }}

{{- define "rafs.labels" -}}
app.kubernetes.io/name: rafs
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
{{- end }}

{{/* What selects the pods of one part: a list of root and part. */}}
{{- define "rafs.selector" -}}
app.kubernetes.io/name: rafs
app.kubernetes.io/instance: {{ (index . 0).Release.Name }}
app.kubernetes.io/component: {{ index . 1 }}
{{- end }}

{{- define "rafs.image" -}}
{{- $repository := required "image.repository: say where the image built from the Dockerfile was pushed" .Values.image.repository -}}
{{- if .Values.image.digest -}}{{ $repository }}@{{ .Values.image.digest }}
{{- else -}}{{ $repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}{{- end -}}
{{- end }}

{{- define "rafs.pullSecrets" -}}
{{- with .Values.image.pullSecrets }}
imagePullSecrets:
{{- range . }}
  - name: {{ . }}
{{- end }}
{{- end }}
{{- end }}

{{/* HOST:PORT of every scheduler. */}}
{{- define "rafs.schedulers" -}}
{{- $root := . -}}
{{- $found := list -}}
{{- range $number := until (int .Values.scheduler.count) -}}
{{- $found = append $found (printf "%s-scheduler-%d.%s.svc:%d" (include "rafs.name" $root) $number $root.Release.Namespace (int $root.Values.scheduler.port)) -}}
{{- end -}}
{{- join "," $found -}}
{{- end }}

{{/* Nobody but this process may become more than it is. */}}
{{- define "rafs.unprivileged" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities: {drop: [ALL]}
{{- end }}

{{- define "rafs.nonRoot" -}}
runAsNonRoot: true
runAsUser: 65532
runAsGroup: 65532
fsGroup: 65532
fsGroupChangePolicy: OnRootMismatch
seccompProfile: {type: RuntimeDefault}
{{- end }}
